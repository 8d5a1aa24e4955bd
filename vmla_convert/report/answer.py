"""Which size to use, and why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vmla_convert.report.settings import DENSE, Dense, Setting
from vmla_convert.report.wording import (
    format_cut,
    format_excess,
    format_number,
    format_range,
)

# Sizes within 2 % count as equal: whole numbers per layer round one budget differently.
SAME_SIZE = 1.02
# Flow loss with another clip's past, over that with the own past, from which on the cache matters.
PAST_MATTERS = 1.02


@dataclass(frozen=True)
class Recommendation:
    """The setting to use.

    Attributes:
        setting: The choice.
        within_bound: Whether the setting's flow loss meets the bound; None without flow loss.
        others: The smallest setting within the bound of each other product.
    """

    setting: Setting
    within_bound: bool | None
    others: tuple[Setting, ...] = ()


def recommend(settings: Sequence[Setting], bound: float) -> Recommendation | None:
    """The smallest cache whose flow loss stays within the bound; the most accurate of equal sizes.

    `bound` is the flow loss allowed above the dense model's, as a share of it.

    Returns:
        The most accurate setting where none meets the bound or has a flow loss; None where no
        setting has a finite error.
    """
    finite = [setting for setting in settings if math.isfinite(setting.error)]
    if not finite:
        return None
    known = [setting for setting in finite if _loss(setting) < math.inf]
    meeting = [setting for setting in known if _loss(setting) <= bound]
    if not meeting:
        best = min(finite, key=lambda each: (each.error, each.nbytes))
        return Recommendation(best, False if known else None)
    best = _smallest(meeting)
    others = [
        _smallest([each for each in meeting if each.product == product])
        for product in dict.fromkeys(each.product for each in meeting)
        if product != best.product
    ]
    return Recommendation(best, True, tuple(others))


def answer_sentence(best: Recommendation | None, bound: float) -> str:
    """The sentence that recommends a size, with cut and error."""
    if best is None:
        return "No size can be recommended: no cache has a finite velocity_error."
    limit = f"{100 * bound:g} %"
    if best.within_bound:
        why = f"it is the smallest cache within {limit} of the dense model's flow loss"
        return f"Use {_priced(best.setting)}: {why} ({_figures(best.setting)})."
    if best.within_bound is None:
        why = "no row has a flow loss, and this is the most accurate cache"
    else:
        why = f"no cache stays within {limit} of the dense model's flow loss"
        why += ", and this is the most accurate"
    return f"Of the measured caches use {_priced(best.setting)}: {why} ({_figures(best.setting)})."


def answer_reasons(best: Recommendation | None, dense: Dense | None, failed: int) -> list[str]:
    """Sentences about the choice: other products, the spread over seeds, failed points."""
    reasons: list[str] = []
    if best is not None:
        setting = best.setting
        reasons += [_compared(other, setting) for other in best.others]
        reasons.append(_certainty(setting))
    if dense is not None and dense.flow_loss is not None:
        reasons.append(_dense_note(dense))
    if failed:
        points = "point" if failed == 1 else "points"
        reasons.append(f"{failed} {points} failed; see Failures.")
    return reasons


def _loss(setting: Setting) -> float:
    """Flow loss above dense; infinite where unknown or diverged."""
    loss = setting.loss
    return loss if loss is not None and math.isfinite(loss) else math.inf


def _smallest(settings: Sequence[Setting]) -> Setting:
    least = SAME_SIZE * min(setting.nbytes for setting in settings)
    return min(
        (setting for setting in settings if setting.nbytes <= least),
        key=lambda each: (each.error, each.nbytes),
    )


def _priced(setting: Setting) -> str:
    """A setting with bytes and cut."""
    name = setting.label
    if setting.product == DENSE:
        name = f"the {DENSE} cache in {setting.key.dtype}"
    elif setting.product == "codec":
        name = f"the {name}"
    priced = f"{name} at {format_number(setting.nbytes)} bytes per token and layer"
    return priced + (f", {format_cut(setting.cut)} less" if setting.cut is not None else "")


def _figures(setting: Setting) -> str:
    """Errors of a setting."""
    when = f"after {setting.last_step} steps of recovery" if setting.last_step else "as converted"
    if setting.product == DENSE:
        when = ""
    facts = [f"velocity_error {format_number(setting.error)}"]
    if setting.loss is not None:
        facts.append(f"flow loss {format_excess(setting.loss)}")
    return ", ".join(filter(None, [" and ".join(facts), when]))


def _compared(other: Setting, best: Setting) -> str:
    times = f"{other.nbytes / best.nbytes:.2g} times as many"
    return f"Also within the bound: {_priced(other)}, {times} ({_figures(other)})."


def _certainty(setting: Setting) -> str:
    """Number of seeds behind the figures, and the spread over seeds."""
    if setting.seeds == 1:
        return "Figures are of one seed; the spread over seeds is unknown."
    spread = format_range(setting.error, setting.error_spread)
    return f"Figures are medians over {setting.seeds} seeds: velocity_error {spread}."


def _dense_note(dense: Dense) -> str:
    note = f"The dense model's flow loss is {format_number(dense.flow_loss)}"
    if dense.flow_loss_other_past is None:
        return f"{note}."
    other = format_number(dense.flow_loss_other_past)
    uses = dense.flow_loss_other_past > PAST_MATTERS * (dense.flow_loss or 0)
    verdict = "the cache matters" if uses else "the past hardly matters, so the errors say little"
    return f"{note}, and {other} when another clip is put in its past: {verdict}."

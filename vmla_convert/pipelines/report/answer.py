"""Which setting to use, and why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vmla_convert.pipelines.report.points import Dense, Point, size_groups
from vmla_convert.pipelines.report.wording import (
    format_cut,
    format_excess,
    format_number,
    format_speed,
    join_words,
)


@dataclass(frozen=True)
class Recommendation:
    """The point to use.

    Attributes:
        point: The setting.
        within_bound: Whether its flow loss meets the bound; None when no row tells.
        runner_up: The next best that meets the bound too.
        smaller: Of the smaller caches, all over the bound, the one with the least flow loss.
    """

    point: Point
    within_bound: bool | None
    runner_up: Point | None = None
    smaller: Point | None = None


def recommend(points: Sequence[Point], bound: float) -> Recommendation | None:
    """The smallest cache whose flow loss stays within the bound; of equals the most accurate.

    Sizes that only rounding keeps apart count as equal.

    Args:
        points: As `read_points` gives them.
        bound: Flow loss allowed above the dense model's, as a share of it.

    Returns:
        When no point meets the bound, or none says its flow loss, the most accurate of all; None
        when no point has a finite error.
    """
    finite = [point for point in points if math.isfinite(point.final_error)]
    if not finite:
        return None
    known = [point for point in finite if _finite_loss(point) < math.inf]
    meeting = [point for point in known if _finite_loss(point) <= bound]
    if not meeting:
        best = min(finite, key=lambda point: (point.final_error, point.size))
        return Recommendation(best, False if known else None)
    best, *others = [
        point
        for group in size_groups(meeting)
        for point in sorted(group, key=lambda point: (point.final_error, point.size))
    ]
    smaller = [point for point in known if point.size < best.size and point not in meeting]
    return Recommendation(
        best, True, next(iter(others), None), min(smaller, key=_finite_loss, default=None)
    )


def answer_sentence(best: Recommendation | None, dense: Dense | None, bound: float) -> str:
    """The sentence that must not be missed."""
    if best is None:
        return "No setting can be recommended: no point has a finite velocity_error."
    point, limit = best.point, f"{100 * bound:g} %"
    setting, figures = _setting(point), _figures(point, dense)
    if best.within_bound:
        return (
            f"Use {setting}. It is the smallest cache within {limit} of the dense model's flow "
            f"loss. {figures} (bound: +{limit})."
        )
    if best.within_bound is None:
        return f"The most accurate is {setting}; no row tells its flow loss. {figures}."
    return (
        f"No setting stays within {limit} of the dense model's flow loss. "
        f"The most accurate is {setting}. {figures}."
    )


def answer_reasons(best: Recommendation | None, dense: Dense | None) -> list[str]:
    """What else speaks for the setting: what it beat, its speed, how sure it is."""
    if best is None:
        return []
    point, reasons = best.point, list[str]()
    if best.runner_up is not None:
        reasons.append(_beaten(best.runner_up, point))
    if best.smaller is not None:
        small = best.smaller
        reasons.append(
            f"Of the smaller caches, the best is {_setting(small)}: {format_size(small)}, "
            f"with flow loss {format_excess(small.final_loss)}, over the bound."
        )
    if point.seconds_ratio is not None and math.isfinite(point.seconds_ratio):
        reasons.append(f"Speed: {format_speed(point.seconds_ratio)}.")
    reasons.append(_certainty(point))
    if dense is not None and dense.flow_loss is not None:
        reasons.append(_dense_note(dense))
    return reasons


def format_size(point: Point) -> str:
    """What a token costs in a layer, in bytes, or in numbers where rows tell no bytes."""
    if point.nbytes is None:
        return f"{format_number(point.scalars)} numbers per token and layer"
    return f"{format_number(point.nbytes)} bytes per token and layer"


def _finite_loss(point: Point) -> float:
    """Flow loss above dense, infinite where it is unknown or diverged."""
    loss = point.final_loss
    return loss if loss is not None and math.isfinite(loss) else math.inf


def _setting(point: Point) -> str:
    """The setting in full: init, sizes, latent, how it is kept."""
    if point.kv_lora_rank is None:
        sizes = f"{format_number(point.scalars)} numbers per token, divided among layers"
    else:
        rope = point.qk_rope_head_dim
        named = [f"kv_lora_rank {point.kv_lora_rank}"]
        named += [f"qk_rope_head_dim {rope}"] if rope else []
        sizes = join_words(named)
    latent = f" ({point.latent} latent)" if point.latent else ""
    kept = f", cache kept as {point.kept.words}" if point.kept.words else ""
    return f"{point.init} with {sizes}{latent}{kept}"


def _figures(point: Point, dense: Dense | None) -> str:
    """What the setting costs and loses, as a sentence without its full stop."""
    costs = format_size(point)
    whole = dense and (dense.scalars if point.nbytes is None else dense.nbytes)
    if whole:
        costs += f" instead of {format_number(whole)}"
    cut = f", which cuts the cache by {format_cut(point.cut)}" if point.cut is not None else ""
    when = f"after {point.last_step} steps of recovery" if point.last_step else "without recovery"
    facts = [f"velocity_error {format_number(point.final_error)}"]
    if point.final_loss is not None:
        facts.append(f"flow loss {format_excess(point.final_loss)} against the dense model")
    return f"It takes {costs}{cut}, and has, {when}, {join_words(facts)}"


def _beaten(other: Point, best: Point) -> str:
    facts = f"velocity_error {format_number(other.final_error)}"
    facts += f" and flow loss {format_excess(other.final_loss)}"
    if len(size_groups([other, best])) == 1:
        same = "the same size" if other.size == best.size else "about the same size"
        return (
            f"Runner-up, of {same} and less accurate: {_setting(other)}, with {facts}."
            if other.final_error > best.final_error
            else f"As good, and of {same}: {_setting(other)}, with {facts}."
        )
    more = f"{format_excess(other.size / best.size - 1).removeprefix('+')} more"
    return (
        f"Runner-up: {_setting(other)}. It stays within the bound too, with {facts}, but takes "
        f"{format_size(other)}, {more}."
    )


def _certainty(point: Point) -> str:
    """Over how many seeds the figures are, and how far these lie apart."""
    if point.seeds == 1:
        return "Figures are of one seed: nothing tells how far another would be from it."
    text = f"Figures are medians over {point.seeds} seeds"
    spreads: list[str] = []
    if point.error_spread is not None:
        low, high = map(format_number, point.error_spread)
        spreads.append(f"velocity_error from {low} to {high}")
    if point.loss_spread is not None and point.losses:
        low, high = map(format_excess, point.loss_spread)
        spreads.append(f"flow loss from {low} to {high}")
    return f"{text}: {join_words(spreads)}." if spreads else f"{text}."


def _dense_note(dense: Dense) -> str:
    note = f"The dense model's flow loss is {format_number(dense.flow_loss)}"
    if dense.flow_loss_other_past is None:
        return f"{note}."
    other = format_number(dense.flow_loss_other_past)
    return f"{note}, and {other} when another clip is put in its past: the cache matters."

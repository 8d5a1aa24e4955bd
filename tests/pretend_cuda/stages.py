"""Every stage, stopped and resumed, on a tiny model: in a process of the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from checkpoints import CLIPS, CONVERT, EVALUATE, MODEL, RECOVER, PowerCut, PowerCutError
from conftest import tiny_model
from safetensors.torch import load_file

from vmla_convert.config import ConvertConfig, DMDConfig, RecoverConfig
from vmla_convert.fitting.calibrate import CALIBRATING, WEIGHING
from vmla_convert.fitting.convert import convert
from vmla_convert.progress import Progress, Silent
from vmla_convert.recovery import layerwise
from vmla_convert.recovery.layerwise import LAYERWISE
from vmla_convert.recovery.recover import recover
from vmla_convert.training.pretrain import save_self_forcing

layerwise.CLIPS, layerwise.HELD_CLIPS = 4, 2

# An average of the weights is a part of the state that the default does not have.
LEARN = replace(RECOVER.training, steps=2, ema=0.9, eval_every=1, checkpoint_every=1)
SHORT = replace(RECOVER, layerwise_steps=1, training=LEARN, data=replace(CLIPS, frames=4))
CODEC = replace(SHORT, nested=(0.9, 0.8), on_policy_steps=2)
MLA = replace(SHORT, training=replace(LEARN, steps=0), dmd=DMDConfig(steps=2, critic_steps=1))
MEASURE = replace(EVALUATE, clips=2, data=replace(EVALUATE.data, frames=4))


def prepare(out: Path) -> None:
    """A dense checkpoint, and a codec that nobody interrupted."""
    save_self_forcing(tiny_model(MODEL).state_dict(), MODEL, out / "dense")
    convert(out / "dense", out / "codec", codec_settings())


def codec_settings() -> ConvertConfig:
    """A codec calibrated on few clips."""
    return ConvertConfig(calibration_clips=3, data=replace(CLIPS, frames=4))


def conversion(out: Path) -> dict[str, Any]:
    """A conversion that stops in each pass."""
    cuts = ((CALIBRATING, 1), (WEIGHING, 1), ("fitting codecs", 1))

    def run(folder: Path, progress: Progress) -> None:
        convert(out / "dense", folder, codec_settings(), progress, resume=True)

    return resumed(out / "codec", out / "codec-resumed", cuts, run)


def codec_recovery(out: Path) -> dict[str, Any]:
    """A recovery of a codec that stops in each stage."""
    return recovery(out, "codec", CODEC, (LAYERWISE, 1), ("distilling", 1), ("on policy", 1))


def mla_recovery(out: Path) -> dict[str, Any]:
    """A recovery of MLA layers that stops in each stage, distribution matching included."""
    convert(out / "dense", out / "mla", CONVERT)
    return recovery(out, "mla", MLA, (LAYERWISE, 1), ("matching distributions", 1))


def recovery(out: Path, product: str, config: RecoverConfig, *cuts: tuple[str, int]) -> Any:
    """Recover a product once without and once with all interruptions."""

    def run(folder: Path, progress: Progress) -> None:
        recover(out / product, out / "dense", folder, config, MEASURE, progress)

    whole = out / f"{product}-whole"
    run(whole, Silent())
    return resumed(whole, out / f"{product}-whole-resumed", cuts, run)


def resumed(
    whole: Path, folder: Path, cuts: Sequence[tuple[str, int]], run: Callable[..., None]
) -> dict[str, Any]:
    """Run into one interruption after the other, then to the end.

    Returns:
        The interruptions that came, and whether both folders hold the same weights, bit for bit.
    """
    came: list[str] = []
    for label, before in cuts:
        try:
            run(folder, PowerCut(label, before))
        except PowerCutError:
            came.append(label)
    run(folder, Silent())
    one, two = (load_file(next(place.rglob("*.safetensors"))) for place in (folder, whole))
    same = one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    return {"came": came, "same": same}

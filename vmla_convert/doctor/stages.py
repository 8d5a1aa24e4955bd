"""Memory and disk that each stage of a shipped recipe needs, and whether a machine has them.

The settings of a stage are those of a shipped recipe. Where they do not fit, a few changes that
save memory are tried, from the mildest to the strongest.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import psutil

from vmla_convert.config import (
    CachePolicy,
    ConvertConfig,
    DataConfig,
    Geometry,
    ModelConfig,
    Recipe,
    RecoverConfig,
    RuntimeConfig,
    SamplerConfig,
)
from vmla_convert.doctor.machine import Machine, found_devices, free_bytes
from vmla_convert.fitting.codec import plan_codec
from vmla_convert.fitting.memory import calibration_disk, conversion_memory
from vmla_convert.generating.memory import generation_memory, sampling_memory
from vmla_convert.generating.own_samples import clips_at_once
from vmla_convert.layers.memory import FLOAT32, GPU_HEADROOM, ClipShape, Memory
from vmla_convert.media.clips import settled
from vmla_convert.recipe.read import read_recipe
from vmla_convert.recovery.memory import recovery_memory

Stage = Literal["sample clips", "convert", "recover", "generate dense", "generate"]
STAGES: tuple[Stage, ...] = ("sample clips", "convert", "recover", "generate dense", "generate")

SAVINGS: dict[Stage, tuple[str, ...]] = {
    "sample clips": (),
    "convert": (
        "convert.mixed_precision=bf16",
        "convert.data.frames=9",
        "convert.calibrate=false",
    ),
    "recover": (
        "recover.training.gradient_checkpointing=true",
        "recover.training.mixed_precision=bf16",
        "recover.offload=true",
        "recover.training.offload_activations=true",
        "recover.data.frames=15",
        "recover.data.frames=9",
        "recover.layerwise_steps=0",
    ),
    "generate dense": ("media.vae_tiling=true", "runtime.offload=true"),
    "generate": ("runtime.tile_mib=128", "media.vae_tiling=true", "runtime.offload=true"),
}
"""Changes of settings that save memory, by stage, from the mildest to the strongest."""

SIZE = "runtime.size."
SMALLER_CACHES = tuple(f"{SIZE}cut={cut}" for cut in (0.95, 0.975, 0.985))
"""Further changes for a codec, the last to be tried: they add to its error."""

WIDE_RECIPE, NARROW_RECIPE = "krea_14b", "self_forcing_1_3b"
# Models of this width and wider are recovered in shards.
WIDE = 3072


@dataclass(frozen=True)
class Room:
    """Memory of a machine.

    Attributes:
        device: Bytes of one GPU; None where the host computes.
        host: Bytes of host memory.
        disk: Free bytes where outputs go; None where that is not known.
        processes: Processes that recover together, one to a GPU.
    """

    device: int | None
    host: int
    disk: int | None = None
    processes: int = 1

    def fits(self, memory: Memory, disk: int = 0) -> bool:
        """Whether a stage fits, with its working files."""
        if self.disk is not None and disk > self.disk:
            return False
        if self.device is None:
            return memory.without_gpu <= self.host
        fits_host = self.host_bytes(memory) <= self.host
        return memory.device + GPU_HEADROOM <= self.device and fits_host

    def host_bytes(self, memory: Memory) -> int:
        """Bytes of host memory that a stage needs."""
        if self.device is None:
            return memory.without_gpu
        return memory.host + memory.staging


def own_room(folder: Path, asked: int | None = None) -> Room:
    """Memory and disk of this machine for an output folder.

    Args:
        folder: The output.
        asked: Bytes of memory that settings are chosen for, of the GPU where there is one; None
            takes the memory that is here.
    """
    devices, host = found_devices(), psutil.virtual_memory().available
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if not devices:
        return Room(None, asked or host, free_bytes(folder), processes)
    smallest = min(device.nbytes for device in devices)
    return Room(asked or smallest, host, free_bytes(folder), processes)


def room_of(machine: Machine) -> Room:
    """Memory and disk of a machine; its smallest GPU counts."""
    devices, disk = machine.devices, machine.free_disk_bytes.get("outputs")
    smallest = min((device.nbytes for device in devices), default=None)
    return Room(smallest, machine.free_host_bytes, disk, max(1, len(devices)))


@dataclass(frozen=True)
class Need:
    """Memory and disk that a stage of a model needs.

    Attributes:
        model: Name of the model.
        stage: Name of the stage.
        device_bytes: Peak bytes on each GPU; 0 where the host computes.
        host_bytes: Peak bytes of host memory, of all processes.
        disk_bytes: Bytes of working files beside the output.
        fits: Whether the machine has this memory and disk.
        changes: Settings, as for `--set`, that differ from the recipe's. Where nothing fits, there
            are none, and the bytes are those of the recipe's settings.
    """

    model: str
    stage: Stage
    device_bytes: int
    host_bytes: int
    disk_bytes: int
    fits: bool
    changes: tuple[str, ...] = ()


def wan(geometry: Geometry, latent_size: tuple[int, int]) -> ModelConfig:
    """A Wan model in three-frame chunks, with a window of 21 frames."""
    return ModelConfig(geometry, latent_size, 3, CachePolicy(21), SamplerConfig())


RELEASED = {
    f"Wan {name} {height}p": wan(geometry, size)
    for name, geometry in (
        ("1.3B", Geometry(1536, 8960, 12, 30, 16, 16)),
        ("14B", Geometry(5120, 13824, 40, 40, 16, 16)),
    )
    for height, size in ((480, (60, 104)), (720, (90, 160)))
}
"""Models of the table that `vmla doctor` prints."""


def recipe_of(model: ModelConfig) -> str:
    """Name of the shipped recipe whose settings suit a model."""
    return WIDE_RECIPE if model.geometry.dim >= WIDE else NARROW_RECIPE


def needs(name: str, model: ModelConfig, room: Room, recipe: str | None = None) -> list[Need]:
    """Memory and disk that each stage of a model needs on a machine.

    Args:
        name: Name of the model, for the table.
        model: The model. A converted one is recovered and generates as it is.
        room: Memory of the machine.
        recipe: Recipe whose settings hold; None for the one that suits the model.
    """
    return [with_savings(name, model, stage, room, recipe or recipe_of(model)) for stage in STAGES]


def with_savings(name: str, model: ModelConfig, stage: Stage, room: Room, recipe: str) -> Need:
    """A stage with the fewest savings that make it fit, or as the recipe has it."""
    demo = model.media == "demo"

    def read(changes: Sequence[str]) -> Recipe:
        settings = read_recipe(recipe, changes, demo)
        return replace(settings, recover=_one_clip_at_a_time(settings.recover, room.processes))

    found = first_fit(model, read, stage, room)
    memory = found.memory
    device = memory.device if room.device is not None else 0
    changes = found.changes if found.fits else ()
    return Need(name, stage, device, room.host_bytes(memory), found.disk, found.fits, changes)


@dataclass(frozen=True)
class Fit:
    """Settings of a stage for some memory.

    Attributes:
        memory: Peak with these settings.
        disk: Bytes of working files.
        fits: Whether the memory is enough.
        changes: Settings that differ from those that were asked for.
    """

    memory: Memory
    disk: int
    fits: bool
    changes: tuple[str, ...] = ()


def first_fit(
    model: ModelConfig,
    read: Callable[[Sequence[str]], Recipe],
    stage: Stage,
    room: Room,
    fixed: Collection[str] = (),
) -> Fit:
    """Find the mildest changes of settings that make a stage fit.

    Args:
        model: The model, dense or converted.
        read: Gives the settings with some changes.
        stage: The stage.
        room: Memory of the machine.
        fixed: Keys that may not change.

    Returns:
        The settings that fit; or those asked for, where none do.
    """

    def measured(changes: tuple[str, ...]) -> Fit:
        memory, disk = stage_memory(model, read(changes), stage, room)
        return Fit(memory, disk, room.fits(memory, disk), changes)

    asked, changes = measured(()), tuple[str, ...]()
    if asked.fits:
        return asked
    for change in _savings(model, read(()), stage, room.processes):
        if _is_fixed(_key(change), fixed):
            continue
        changes = (*(each for each in changes if _key(each) != _key(change)), change)
        if measured(changes).fits:
            return measured(_needed(changes, lambda fewer: measured(fewer).fits))
    return asked


def _savings(model: ModelConfig, recipe: Recipe, stage: Stage, processes: int) -> tuple[str, ...]:
    """Changes to try, from the mildest to the strongest."""
    if stage == "recover" and recipe.recover is not None:
        parts = _clips_each(recipe.recover, processes)
        return (f"recover.training.accumulate={parts}", *SAVINGS[stage])
    smaller = stage == "generate" and model.codec is not None
    return (*SAVINGS[stage], *(SMALLER_CACHES if smaller else ()))


def _is_fixed(key: str, fixed: Collection[str]) -> bool:
    """Whether the user set a key, or the same thing by another key."""
    if key.startswith(SIZE):
        return any(each.startswith(SIZE) for each in fixed)
    return key in fixed


def _needed(changes: tuple[str, ...], fits: Callable[[tuple[str, ...]], bool]) -> tuple[str, ...]:
    """Leave out the changes that a stage fits without, the strongest first."""
    for change in reversed(changes):
        fewer = tuple(each for each in changes if each != change)
        if fits(fewer):
            changes = fewer
    return changes


def _key(change: str) -> str:
    return change.partition("=")[0]


def stage_memory(
    model: ModelConfig, recipe: Recipe, stage: Stage, room: Room
) -> tuple[Memory, int]:
    """Peak memory of a stage, and bytes of its working files.

    A GPU computes in bfloat16 where the stage lets it, a CPU in float32.
    """
    on_gpu = room.device is not None
    item = 2 if on_gpu else FLOAT32
    dense = replace(model, mla=None, codec=None)
    convert, recover = recipe.convert or ConvertConfig(), recipe.recover or RecoverConfig()
    if stage == "sample clips":
        return sampling_memory(dense, item, clips_at_once(dense), on_gpu), 0
    if stage == "convert":
        clip = _clip(convert.data, dense)
        return conversion_memory(dense, convert, clip), calibration_disk(dense, convert, clip)
    converted = plan_codec(dense, convert) if model.is_dense else model
    if stage == "recover":
        clip = _clip(recover.data, dense)
        memory = recovery_memory(converted, recover, clip, room.processes)
        host, staging = (room.processes * nbytes for nbytes in (memory.host, memory.staging))
        return memory._replace(host=host, staging=staging), 0
    runtime = recipe.runtime
    if stage == "generate dense" or model.is_dense:
        runtime = RuntimeConfig(offload=runtime.offload, tile_mib=runtime.tile_mib)
    shown = dense if stage == "generate dense" else converted
    return generation_memory(shown, runtime, item, recipe.media, on_gpu), 0


def _clip(data: DataConfig, model: ModelConfig) -> ClipShape:
    frames = settled(data, model).frames
    assert frames is not None
    return ClipShape(frames, *(data.latent_size or model.latent_size))


def _one_clip_at_a_time(recover: RecoverConfig | None, processes: int) -> RecoverConfig:
    """The same steps; each process passes its clips one after the other."""
    recover = recover or RecoverConfig()
    parts = _clips_each(recover, processes)
    return replace(recover, training=replace(recover.training, accumulate=parts))


def _clips_each(recover: RecoverConfig, processes: int) -> int:
    """Clips of a process in a step; passed one at a time they give the same gradient."""
    return max(1, recover.training.batch_size // processes)

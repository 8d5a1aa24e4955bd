"""A codec of the tiny checkpoint, and a pair of base model and codec that tests may change.

Test files ask for these fixtures with `pytest_plugins = ["checkpoints", "codec_files"]`.
PYTEST_DONT_REWRITE, because test files import from this module before pytest sees it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import CLIPS, MODEL
from conftest import chunk_timesteps, tiny_clip
from reference.masks import block_causal_mask
from torch import Tensor

from vmla_convert.config import ConvertConfig
from vmla_convert.fitting.convert import convert
from vmla_convert.layers.dit import CausalWanModel

CODEC = "codec.safetensors"
NAMES = {CODEC, "config.json", "conversion.json", "README.md"}
MADE = ConvertConfig(channels=40, calibration_clips=4, data=CLIPS)
QUICK = replace(MADE, calibrate=False)
LAYERS, DIM = MODEL.geometry.num_layers, MODEL.geometry.dim
TRAINED = {f"blocks.{i}.codec.{part}" for i in range(LAYERS) for part in ("encode", "decode")}
FRAMES = 6


def velocity(model: CausalWanModel) -> Tensor:
    """Velocity of one fixed clip, each chunk with its past."""
    config = replace(model.config, latent_size=(4, 6))
    latents, context = tiny_clip(config, FRAMES)
    mask = block_causal_mask(FRAMES, config.chunk_frames, config.tokens_per_frame, config.cache)
    timestep = chunk_timesteps(config, FRAMES)
    with torch.no_grad():
        return model(latents, timestep, context, torch.arange(FRAMES), mask)


def near(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((one - other).norm() <= tolerance * other.norm())


def codec_state(model: CausalWanModel) -> dict[str, Tensor]:
    return {name: t for name, t in model.state_dict().items() if ".codec." in name}


def edit_record(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a folder's conversion.json."""
    file = folder / "conversion.json"
    record = json.loads(file.read_text())
    change(record)
    file.write_text(json.dumps(record))


@pytest.fixture(scope="session")
def codec(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Codec of the tiny checkpoint."""
    folder = tmp_path_factory.mktemp("codec") / "kv"
    convert(teacher, folder, MADE)
    return folder


class Pair:
    """A dense checkpoint and its codec, both of which may be moved and changed.

    Attributes:
        base: Folder of the dense checkpoint.
        codec: Folder of the codec, in another folder than the base.
    """

    def __init__(self, place: Path, teacher: Path, codec: Path) -> None:
        self.base = shutil.copytree(teacher, place / "models" / "dense")
        self.codec = shutil.copytree(codec, place / "codecs" / "kv")
        here = {"path": str(self.base), "name": self.base.name}
        edit_record(self.codec, lambda record: record["base"].update(here))

    def change_base(self, change: Callable[[dict[str, Tensor]], object]) -> None:
        """Change dense tensors by native name."""
        file = self.base / "model.pt"
        state = torch.load(file, weights_only=True)["generator_ema"]
        native = {name.removeprefix("model."): tensor for name, tensor in state.items()}
        change(native)
        torch.save({"generator_ema": {f"model.{n}": t for n, t in native.items()}}, file)


@pytest.fixture
def pair(tmp_path: Path, teacher: Path, codec: Path) -> Pair:
    return Pair(tmp_path, teacher, codec)

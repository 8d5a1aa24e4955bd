"""Formulas of peak memory hold for processes on the CPU at a medium size."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from measured_peak import peak_above_start
from safetensors.torch import save_file

from evals.scale import random_weight
from vmla_convert.checkpoint.geometry import native_shapes
from vmla_convert.config import ConvertConfig, Geometry, RuntimeConfig, Sizes, SourceConfig
from vmla_convert.fitting.codec import plan_codec
from vmla_convert.fitting.memory import conversion_memory
from vmla_convert.layers.memory import ClipShape, streaming_memory
from vmla_convert.loading.load import recognise_named

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc/self/status"),
]

# Half the width of Wan 1.3B.
GEOMETRY = Geometry(768, ffn_dim=4480, num_heads=6, num_layers=2, in_dim=16, out_dim=16)
CLIPS, CLIP = 6, ClipShape(9, 16, 24)
# A quarter of the area of 480p, and one denoising step.
MODEL = {"latent_size": [30, 52], "sampler": {"denoising_step_list": [1000]}}

# The demo model first loads every library that the lines below need.
SETUP = """
import pathlib, tempfile
from vmla_convert.fitting.convert import convert
from vmla_convert.config import ConvertConfig, DataConfig, RuntimeConfig, Sizes, SourceConfig
from vmla_convert.generating.rollout import NewPrompt, rollout
from vmla_convert.loading.load import load

def stream(source, chunks, size):
    model = load(source)
    geometry = model.config.geometry
    prompt = NewPrompt(torch.zeros(1, geometry.text_len, geometry.text_dim))
    generators = lambda chunk: [torch.Generator().manual_seed(chunk)]
    for chunk in rollout(
        model, chunks, lambda frame: None if frame else prompt, generators, RuntimeConfig(size=size)
    ):
        pass

with tempfile.TemporaryDirectory() as folder:
    convert("demo", pathlib.Path(folder) / "kv", ConvertConfig(calibration_clips=2))
stream("demo", 2, None)
"""
CONVERT = """
data = DataConfig(given["clips"], frames=9)
config = ConvertConfig(calibration_clips=6, data=data)
source = SourceConfig(given["source"], overrides=given["model"])
convert(source, pathlib.Path(given["out"]), config)
"""
STREAM = """
source = SourceConfig(given["source"], overrides=given["model"])
stream(source, 8, Sizes(cut=0.95) if given["codec"] else None)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint, clips, and the codec of the checkpoint."""
    place = tmp_path_factory.mktemp("medium")
    shapes = native_shapes(GEOMETRY)
    save_file({n: random_weight(n, s) for n, s in shapes.items()}, place / "model.safetensors")
    clips = torch.randn(CLIPS, CLIP.frames, 16, CLIP.height, CLIP.width)
    context = torch.randn(CLIPS, 512, 4096)
    save_file({"latents": clips, "context": context}, place / "clips.safetensors")
    return place


def test_conversion_and_streaming_peak_where_the_formulas_say(folder: Path) -> None:
    source, out = str(folder / "model.safetensors"), str(folder / "codec")
    clips = str(folder / "clips.safetensors")
    dense = recognise_named(SourceConfig(source, overrides=MODEL)).config
    config = ConvertConfig(calibration_clips=CLIPS)
    measured = {
        "convert": peak_above_start(
            SETUP, CONVERT, source=source, clips=clips, out=out, model=MODEL
        )
    }
    formula = {"convert": conversion_memory(dense, config, CLIP).without_gpu}
    for product, path in (("dense", source), ("codec", out)):
        codec = product == "codec"
        model = plan_codec(dense, config) if codec else dense
        runtime = RuntimeConfig(size=Sizes(cut=0.95) if codec else None)
        settings = {} if codec else MODEL  # a codec's folder holds them
        measured[product] = peak_above_start(
            SETUP, STREAM, source=path, codec=codec, model=settings
        )
        formula[product] = streaming_memory(model, runtime, 4, on_gpu=False).without_gpu
    ratios = {stage: formula[stage] / measured[stage] for stage in measured}
    # Read with pytest -s.
    print({stage: f"{nbytes / 1e6:.0f} MB" for stage, nbytes in measured.items()}, ratios)
    assert ratios == pytest.approx(dict.fromkeys(ratios, 1.0), abs=0.15)

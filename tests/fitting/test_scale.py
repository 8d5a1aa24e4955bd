"""Memory that does not grow with depth, and the program that measures true sizes, at a tiny one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import noise, tiny_config, tiny_model
from safetensors.torch import save_file

from evals import scale
from vmla_convert.config import Geometry
from vmla_convert.results import Metric, read_rows
from vmla_convert.training.pretrain import save_self_forcing

WIDE = Geometry(
    dim=256,
    ffn_dim=6144,
    num_heads=2,
    num_layers=3,
    in_dim=4,
    out_dim=4,
    freq_dim=16,
    text_dim=8,
    text_len=3,
)
FEW, MANY = 3, 12
CONVERT = [sys.executable, "-m", "vmla_convert", "convert"]
# What is freed goes back to the system at once, so that the peak is what was in use.
TIGHT = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
SMALL = Geometry(
    dim=256,
    ffn_dim=64,
    num_heads=2,
    num_layers=2,
    in_dim=16,
    out_dim=16,
    freq_dim=16,
    text_dim=8,
    text_len=4,
)


@pytest.fixture(scope="module")
def depths(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same model, shallow and deep, and clips for both."""
    place = tmp_path_factory.mktemp("depths")
    for layers in (FEW, MANY):
        config = tiny_config(replace(WIDE, num_layers=layers))
        save_self_forcing(tiny_model(config).state_dict(), config, place / str(layers))
    clips = {"latents": noise(4, 4, WIDE.in_dim, 4, 6), "context": noise(4, 3, 8)}
    save_file(clips, place / "clips")
    return {layers: place / str(layers) for layers in (FEW, MANY)}


WAYS = {
    "codec": [],
    "codec without data": ["--no-calibration"],
    "MLA": ["--preset", "videomla", "--set", "convert.init=calibrated", "--cut", "0.8"],
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_memory_does_not_grow_with_the_number_of_blocks(
    way: str, depths: dict[int, Path], tmp_path: Path
) -> None:
    words = list(WAYS[way])
    words += ["--data", str(depths[FEW].parent / "clips"), "--set", "convert.calibration_clips=2"]
    running = [
        subprocess.Popen(
            [*CONVERT, str(source), "-o", str(tmp_path / str(layers)), *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | TIGHT,
        )
        for layers, source in depths.items()
    ]
    assert [process.wait() for process in running] == [0, 0]
    told = {n: json.loads((tmp_path / str(n) / "conversion.json").read_text()) for n in depths}
    peaks = {layers: one["peak_rss_bytes"] for layers, one in told.items()}
    sizes = {layers: (source / "model.pt").stat().st_size for layers, source in depths.items()}
    added = sizes[MANY] - sizes[FEW]
    assert added > 50 * 10**6
    assert peaks[MANY] - peaks[FEW] < added / 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "way"), [("1.3b", "assumed"), ("14b", "calibrated"), ("1.3b", "mla")]
)
def test_the_program_measures_a_conversion(
    size: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(scale.SIZES, size, SMALL)
    monkeypatch.setattr(scale, "LATENT_SIZE", (4, 6))
    rows_file, folder = tmp_path / "rows.jsonl", tmp_path / "place"
    scale.main(size=size, rows_file=rows_file, conversion=way, folder=folder)
    rows = read_rows(rows_file)
    run = f"{size} {way}"
    one = {(row.run, row.metric): row.value for row in rows}
    assert all(value > 0 for value in one.values())
    assert one[run, Metric.CONVERT_SECONDS] > one[run, Metric.FACTOR_SECONDS]
    assert one[run, Metric.PEAK_RSS_BYTES] > 10**7
    assert ((f"{run}, calibrating", "stage_seconds") in one) == (way == "calibrated")
    source = folder / ("1.3b.pt" if size == "1.3b" else "14b")
    assert source.exists()
    assert not (folder / "converted").exists()
    before = source.stat().st_mtime_ns
    assert scale.write_source(folder, size, SMALL) == source
    assert source.stat().st_mtime_ns == before
    # Added to the rows that are there; a figure that is measured again replaces its row.
    other = replace(rows[0], run="another run")
    scale.put_rows(rows_file, [rows[0], other])
    assert sorted(read_rows(rows_file), key=str) == sorted([*rows, other], key=str)


def test_random_weights_keep_signals_about_their_size() -> None:
    x = torch.randn(64, 512)
    linear = scale.random_weight("blocks.0.ffn.0.weight", (256, 512))
    assert 0.8 < (x @ linear.mT).std() < 1.25
    gain = scale.random_weight("blocks.0.norm3.weight", (512,))
    assert 0.9 < gain.mean() < 1.1 and gain.std() < 0.1
    assert scale.random_weight("blocks.0.ffn.0.bias", (512,)).abs().max() < 0.2

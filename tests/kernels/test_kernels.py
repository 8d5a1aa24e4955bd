"""Kernels compute what their eager twins compute, and compile for every GPU that is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import noise

from evals.kernels import PROGRAMS, TARGETS, compiled
from vmla_convert.kernels import rotary
from vmla_convert.maths.rope3d import rotary_table, rotate, token_positions

HERE = Path(__file__).parent
TABLE = rotary_table(token_positions(torch.arange(3), 2, 2), 16)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-5), ("float16", 5e-3)])
def test_interpreted_programs_compute_what_plain_operations_do(dtype: str, error: float) -> None:
    """The interpreter's products of bfloat16 are wrong."""
    ran = subprocess.run(
        [sys.executable, HERE / "interpreted.py", dtype],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(HERE.parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    errors = json.loads(ran.stdout)
    assert errors.pop("outside") == errors.pop("unpacked") == 0
    assert 0 < max(errors.values()) < error, errors


@pytest.mark.parametrize("target", TARGETS)
def test_programs_compile_for_a_gpu(target: int) -> None:
    """With matrix instructions in the product, and without spilled registers."""
    for name in PROGRAMS:
        row = compiled(name, target)
        assert row.spilled == 0 and row.shared <= 99 * 1024, row
        assert bool(row.matrix) == (name == "decode_rotated"), row


@DTYPES
@torch.no_grad()
def test_the_eager_twins(dtype: torch.dtype) -> None:
    x = noise(2, 12, 3, 16).to(dtype)
    expected = rotate(x, TABLE)
    assert torch.equal(rotary.rotated(x, TABLE), expected)
    whole = torch.zeros(2, 15, 4, 16, dtype=dtype)
    place = whole[:, :12, 1:]
    place.copy_(x)
    assert rotary.rotate_(place, TABLE) is place
    assert torch.equal(place, expected) and not whole[:, 12:].any() and not whole[:, :, 0].any()


@DTYPES
@torch.no_grad()
def test_keys_are_decoded_into_their_place(dtype: torch.dtype) -> None:
    channels, weight, mean = (x.to(dtype) for x in (noise(2, 12, 7), noise(48, 7), noise(48)))
    whole = torch.zeros(2, 15, 4, 16, dtype=dtype)
    rotary.decode_rotated(channels, weight, mean, TABLE, whole[:, :12, :3])
    decoded = torch.nn.functional.linear(channels, weight, mean).unflatten(-1, (3, 16))
    atol = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(whole[:, :12, :3], rotate(decoded, TABLE), atol=atol, rtol=0)
    assert not whole[:, 12:].any() and not whole[:, :, 3:].any()

"""Layers at the width of Wan 1.3B and 14B on a pretend GPU: formulas of memory, and no waiting."""

from __future__ import annotations

from typing import Any

import pytest

from pretend_cuda.fixtures import Scenarios

pytest_plugins = ["pretend_cuda.fixtures"]

GB = 1e9


def check_stream(results: dict[str, Any]) -> None:
    for path, found in results.items():
        assert found["peak"] == pytest.approx(found["formula"], rel=0.1), path
        assert found["peak with kernels"] <= found["peak"], path
        assert not found["waits of a layer"], path
        assert not found["doubles of a layer"], path
        # A fused kernel for every product of attention.
        assert found["attention"] and not any("math" in name for name in found["attention"]), path


def test_streaming_takes_the_memory_of_the_formula_and_never_waits(scenarios: Scenarios) -> None:
    check_stream(scenarios("widths", "stream_codec")["stream_codec"])


@pytest.mark.slow
def test_every_path_takes_the_memory_of_the_formula_and_never_waits(scenarios: Scenarios) -> None:
    for results in scenarios("widths", "stream_1_3b", "stream_14b").values():
        if isinstance(results, dict):
            check_stream(results)


CEILINGS = {
    "calibration_1_3b": 18.0,
    "calibration_1_3b_mla": 18.0,
    "calibration_14b": 18.0,
    "recovery_1_3b": 22.0,
    "recovery_1_3b_kept": 22.0,
    "recovery_1_3b_mla": 22.0,
    "recovery_14b": 22.0,
    "layerwise_1_3b": 22.0,
    "layerwise_14b": 24.0,
}
"""Most GB of each scenario of two or three layers."""
QUICK = ("calibration_14b", "recovery_14b", "recovery_1_3b_mla")


def check_training(scenarios: Scenarios, *names: str) -> None:
    results = scenarios("widths", *names)
    for name in names:
        found = results[name]
        assert found["peak"] == pytest.approx(found["formula"], rel=0.1), name
        assert found["peak"] < CEILINGS[name] * GB, name


def test_training_takes_the_memory_of_the_formula(scenarios: Scenarios) -> None:
    check_training(scenarios, *QUICK)


@pytest.mark.slow
def test_training_of_more_kinds_takes_the_memory_of_the_formula(scenarios: Scenarios) -> None:
    check_training(scenarios, *sorted(set(CEILINGS) - set(QUICK)))


@pytest.mark.slow
def test_tiles_of_the_vae_leave_their_features_in_host_memory(scenarios: Scenarios) -> None:
    pytest.importorskip("diffusers")
    found = scenarios("widths", "vae")["vae"]
    assert found["peak"] == pytest.approx(found["formula"], rel=0.1)
    assert found["kept"] == pytest.approx(found["kept formula"], rel=0.1)
    assert found["peak"] < 2 * GB

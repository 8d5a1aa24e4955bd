"""The package on a pretend GPU: every command and stage, and layers of true width.

No GPU is needed. `device.py` says what the pretend one checks. Each test runs processes of their
own, because the device is there for a whole process.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pretend_cuda.fixtures import Scenarios

pytest_plugins = ["pretend_cuda.fixtures"]

CONTROLS = {
    "table_of_the_host": "tensors of the card and of the host",
    "two_dtypes": "float32",
    "keys_of_another_dtype": "float32",
    "unaligned_value": "unaligned v",
}


def test_the_device_refuses_what_a_gpu_refuses(scenarios: Scenarios) -> None:
    results = scenarios("controls", "nothing_wrong", *CONTROLS, fails=True)
    assert results["nothing_wrong"] is None
    for name, reason in CONTROLS.items():
        assert results[name] is not None, f"{name} went unnoticed"
        assert reason in results[name].splitlines()[0]


def test_a_codec_is_made_recovered_and_used(scenarios: Scenarios) -> None:
    names = ("convert", "recover", "use")
    results = scenarios("verbs", *names)
    assert all(results[f"{name}: kernels"] > 1000 for name in names)


@pytest.mark.slow
def test_every_other_command_runs(scenarios: Scenarios) -> None:
    names = ("convert_mla", "recover_mla", "use_more", "run_recipe", "run_sweep")
    results = scenarios("verbs", "convert", *names)
    # Layers of the paper's init are made on the CPU, without clips.
    assert all(results[f"{name}: kernels"] > 1000 for name in names if name != "convert_mla")


@pytest.mark.slow
def test_a_gpu_makes_the_codec_of_the_cpu(scenarios: Scenarios, tmp_path: Path) -> None:
    for plain in (False, True):
        scenarios("verbs", "convert", plain=plain)
    card, host = (
        load_file(tmp_path / place / "kv/codec.safetensors") for place in ("card", "plain")
    )
    assert card.keys() == host.keys()
    for name in (name for name in host if name.endswith("energies")):
        torch.testing.assert_close(card[name].sum(), host[name].sum(), rtol=1e-3, atol=0.0)


def test_stages_of_a_codec_resume_bit_for_bit(scenarios: Scenarios) -> None:
    results = scenarios("stages", "prepare", "conversion", "codec_recovery")
    cuts = ["calibrating", "weighing errors", "fitting codecs"]
    assert results["conversion"] == {"came": cuts, "same": True}
    cuts = ["layer by layer", "distilling", "on policy"]
    assert results["codec_recovery"] == {"came": cuts, "same": True}


@pytest.mark.slow
def test_stages_of_mla_layers_resume_bit_for_bit(scenarios: Scenarios) -> None:
    results = scenarios("stages", "prepare", "mla_recovery")
    cuts = ["layer by layer", "matching distributions"]
    assert results["mla_recovery"] == {"came": cuts, "same": True}

"""The README's commands in their order on a tiny Wan pipeline, to the Hub and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import Vmla
from hub_stub import Hub
from tiny_wan import SET

import vmla_convert as vmla_package
from vmla_convert.layers.dit import CausalWanModel

pytest_plugins = ["checkpoints", "hub_stub", "tiny_wan"]

# That huggingface-hub 2.4 uploads in a way that its HTTP library calls old is not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO, BASE = "user/tiny-wan-kv", "user/wan"
PROMPT = "a cat walks on a red roof in the rain"


def test_from_a_pipeline_to_the_hub_and_back_to_the_same_frames(
    wan_folder: Path, tmp_path: Path, stub: Hub, vmla: Vmla
) -> None:
    stub.put_folder(BASE, wan_folder)
    prompts, step0, final = tmp_path / "prompts.txt", tmp_path / "kv", tmp_path / "recovered"
    prompts.write_text(f"{PROMPT}\ntwo dogs run along the beach\n")

    told = vmla("inspect", wan_folder, *SET, "--json")
    assert json.loads(told.out)["family"] == "diffusers"
    assert vmla("convert", BASE, "-o", step0, "--no-calibration", *SET).code == 0
    assert (step0 / "codec.safetensors").is_file()
    self_made = (
        "--data",
        "self",
        "--prompts",
        prompts,
        "--set",
        "recover.data.clips=4",
        "--set",
        "recover.data.frames=6",
    )
    stages = ("--set", "recover.layerwise_steps=2", "--steps", 2, "--batch-size", 2, "--lr", 1e-3)
    recovered = vmla("recover", step0, "-o", final, *self_made, *stages)
    assert recovered.code == 0, recovered.err
    wanted = ("--prompt", PROMPT, "--frames", 8, "--set", f"media.base={wan_folder}")
    assert vmla("generate", final, *wanted, "-o", tmp_path / "here.mp4").code == 0
    assert vmla("push", final, REPO).code == 0
    assert REPO in stub.repos
    there = vmla("generate", REPO, *wanted, "-o", tmp_path / "there.mp4")
    assert there.code == 0, there.err
    frames = [(tmp_path / name).read_bytes() for name in ("here.mp4", "there.mp4")]
    assert len(frames[0]) > 1000
    assert frames[0] == frames[1]
    assert (tmp_path / "here.png").read_bytes() == (tmp_path / "there.png").read_bytes()

    local, loaded = vmla_package.load(final), vmla_package.load(REPO)
    assert isinstance(loaded, CausalWanModel)
    for name, tensor in local.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_a_pipeline_on_the_hub_brings_its_own_components(
    wan_folder: Path, tmp_path: Path, stub: Hub, vmla: Vmla
) -> None:
    """Taken when they are needed, and of the commit that the weights are of."""
    stub.put_folder(BASE, wan_folder)
    cut = ("--preset", "videomla", "--cut", 0.5, *SET, "--layout", "diffusers")
    made = vmla("convert", "user/wan", "-o", tmp_path / "there", *cut)
    assert made.code == 0, made.err
    commit = stub.repos["user/wan"].head
    assert f"--set media.base=user/wan@{commit}" in " ".join(made.err.split())
    assert not (tmp_path / "there" / "vae").exists()
    assert not stub.calls("GET", "*/vae/*")
    film = ("--prompt", PROMPT, "--frames", 4, "-o")
    for name, source in (("here", wan_folder), ("there", "user/wan")):
        ran = vmla("generate", source, *SET, *film, tmp_path / f"{name}.mp4")
        assert ran.code == 0, ran.err
    assert (tmp_path / "here.mp4").read_bytes() == (tmp_path / "there.mp4").read_bytes()

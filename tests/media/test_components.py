"""Text encoder and VAE are found, fetched part by part, and refused where they do not fit."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_wan import PROMPT, wan_latents

from vmla_convert.config import Geometry, MediaConfig, ModelConfig
from vmla_convert.errors import CheckpointError, ConfigError, MissingExtraError
from vmla_convert.media.base import Media
from vmla_convert.media.components import Components, find_components
from vmla_convert.media.open import open_media
from vmla_convert.media.wan import PACKAGES, WanMedia

pytest_plugins = ["tiny_wan"]


def full_size(config: ModelConfig, channels: int = 16, base_model: str = "unknown") -> ModelConfig:
    """The config of Wan 1.3B, whose components are known."""
    geometry = Geometry(1536, 8960, 12, 30, channels, channels)
    return replace(config, geometry=geometry, base_model=base_model)


def test_components_lie_beside_the_checkpoint_or_where_the_user_says(
    wan_config: ModelConfig, wan_folder: Path
) -> None:
    for place in (wan_folder, wan_folder / "transformer"):
        assert find_components(wan_config, checkpoint=place) == Components(str(wan_folder))
    assert find_components(wan_config, "owner/name", wan_folder).base == "owner/name"
    assert find_components(wan_config, str(wan_folder)).base == str(wan_folder)


@pytest.mark.parametrize(
    ("channels", "base_model", "found"),
    [
        (16, "gdhe17/Self-Forcing", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
        (16, "Wan-AI/Wan2.1-T2V-14B-Diffusers", "Wan-AI/Wan2.1-T2V-14B-Diffusers"),
        (48, "Efficient-Large-Model/LongLive-2.0-5B", "Wan-AI/Wan2.2-TI2V-5B-Diffusers"),
    ],
)
def test_components_of_known_models_are_on_the_hub(
    channels: int, base_model: str, found: str, wan_config: ModelConfig
) -> None:
    assert find_components(full_size(wan_config, channels, base_model)).base == found


def test_a_part_beside_the_checkpoint_replaces_the_known_one(
    wan_config: ModelConfig, wan_folder: Path, wan_media: Media, tmp_path: Path
) -> None:
    shutil.copytree(wan_folder / "transformer", tmp_path / "model")
    vae = shutil.copytree(wan_folder / "vae", tmp_path / "model" / "vae")
    found = find_components(full_size(wan_config), checkpoint=tmp_path / "model")
    assert found == Components("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", {"vae": vae})
    assert found.folder("vae") == vae
    parts = Components(str(wan_folder), {"vae": vae})
    own = WanMedia(wan_config, parts, MediaConfig(), torch.device("cpu"), torch.float32)
    assert torch.equal(own.decode(wan_latents(1)), wan_media.decode(wan_latents(1)))
    assert str(vae.parent) in own.name and str(wan_folder) in own.name


def test_missing_components_are_refused(
    wan_config: ModelConfig, wan_folder: Path, tmp_path: Path
) -> None:
    alone = shutil.copytree(wan_folder / "transformer", tmp_path / "alone")
    (tmp_path / "vae").mkdir()
    places = {None: ConfigError, "no/such/place": CheckpointError, str(tmp_path): CheckpointError}
    for base, error in places.items():
        with pytest.raises(error) as caught:
            find_components(wan_config, base, None if base is None else alone)
        assert "media.base" in caught.value.hint


@pytest.mark.parametrize("package", PACKAGES)
def test_without_its_packages_the_extra_is_named(
    package: str, wan_config: ModelConfig, wan_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError) as caught:
        open_media(wan_config, checkpoint=wan_folder)
    assert "[wan]" in caught.value.hint


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_components_of_another_model_are_refused(
    part: str, wan_config: ModelConfig, wan_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(wan_folder, tmp_path / "other")
    file = folder / part / "config.json"
    table = json.loads(file.read_text())
    file.write_text(json.dumps({**table, "z_dim": 48, "d_model": 4096}))
    with pytest.raises(ConfigError, match=rf"{part} .* (48|4096)") as caught:
        open_media(wan_config, MediaConfig(str(folder)))
    assert "media.base" in caught.value.hint


@pytest.mark.parametrize("damage", ["pickle", "cut", "lacking", "table"])
@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_damaged_components_and_pickles_are_named(
    part: str, damage: str, wan_config: ModelConfig, wan_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(wan_folder, tmp_path / "damaged")
    (file,) = (folder / part).glob("*.safetensors")
    tensors = load_file(file)
    if damage == "pickle":
        stem = "diffusion_pytorch_model" if part == "vae" else "pytorch_model"
        torch.save(tensors, file.with_name(f"{stem}.bin"))
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "table":
        (folder / part / "config.json").write_text("[]")
    else:
        del tensors[max(tensors)]
        save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=part):
        media = open_media(wan_config, MediaConfig(str(folder)))
        media.encode_prompts([PROMPT]) if part != "vae" else media.decode(wan_latents(1))


def test_components_come_from_the_hub_part_by_part(
    wan_config: ModelConfig, wan_folder: Path, wan_media: Media, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening downloads two small files, decoding only the VAE."""
    taken: list[str] = []

    def fetched(repo: str, *parts: str) -> Path:
        assert repo == "someone/wan@v1"
        taken.extend(parts)
        return wan_folder

    monkeypatch.setattr("vmla_convert.media.components.fetch_parts", fetched)
    remote = open_media(wan_config, MediaConfig("someone/wan@v1"))
    assert taken == ["vae/config.json", "text_encoder/config.json"]
    assert torch.equal(remote.decode(wan_latents(1)), wan_media.decode(wan_latents(1)))
    assert taken[2:] == ["vae/"]
    assert torch.equal(remote.encode_prompts([PROMPT]), wan_media.encode_prompts([PROMPT]))
    assert sorted(taken[3:]) == ["text_encoder/", "tokenizer/"]

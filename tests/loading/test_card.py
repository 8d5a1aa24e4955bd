"""A model card states known facts, takes the licence from the source, and hides local folders."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any, TypeVar, get_type_hints

import pytest
from checkpoints import MODEL
from huggingface_hub import ModelCard

from vmla_convert.checkpoint.hub import is_repo
from vmla_convert.config import ConvertConfig, DataConfig, MLAConfig, RecoverConfig, SourceConfig
from vmla_convert.loading.card import is_untouched, model_card
from vmla_convert.loading.public_record import without_folders
from vmla_convert.tables import to_dict

T = TypeVar("T")

MLA = MLAConfig(kv_lora_rank=(8, 8), rope_pairs=((0, 1), (2, 3)), init="calibrated")
CONFIG = replace(MODEL, mla=MLA, base_model="someone/dense")
SOURCE: dict[str, Any] = {
    "name": "dense.pt",
    "sha256": "abc123",
    "known_model": None,
    "asked": {"file": None, "loras": ["/home/me/secret/lora.pt:0.5"]},
    "loras": [],
}
RECORD: dict[str, Any] = {
    "source": SOURCE,
    "convert": {"init": "calibrated", "data": {"source": "/home/me/secret/latents.safetensors"}},
    "versions": {"vmla_convert": "0.1.0"},
    "convert_seconds": 12.5,
}
ERRORS = {
    "source": "demo",
    "clips": 48,
    "first": {"step": 0, "velocity_error": 0.0123, "flow_loss": 0.55},
    "last": {"step": 140, "velocity_error": 0.00456, "flow_loss": 0.51},
    "dense_flow_loss": 0.5,
}


def metadata(card: str) -> dict[str, Any]:
    """The card's metadata, as the Hub's own library reads it."""
    return ModelCard(card).data.to_dict()


def test_the_hub_reads_the_metadata() -> None:
    assert metadata(model_card(CONFIG, RECORD)) == {
        "license": "apache-2.0",
        "base_model": "someone/dense",
        "library_name": "vmla-convert",
        "pipeline_tag": "text-to-video",
        "tags": ["vmla", "latent-kv-cache", "causal-video-diffusion"],
    }


@pytest.mark.parametrize("base_model", ["unknown", "../secret/dense"])
def test_an_unknown_source_is_not_invented(base_model: str) -> None:
    card = model_card(replace(CONFIG, licence="unknown", base_model=base_model), {})
    assert metadata(card)["license"] == "unknown"
    assert "base_model" not in metadata(card)
    assert "https://huggingface.co/" not in card
    assert not re.search(r"\bNone\b|secret", card)


@pytest.mark.parametrize(
    ("known", "name", "link"),
    [
        ("rolling-forcing", "license-terms-of-rollingforcing", "TencentARC/RollingForcing"),
        (None, "unknown", "huggingface.co/someone/dense"),
    ],
)
def test_special_terms_are_named_and_linked(known: str | None, name: str, link: str) -> None:
    record = {"source": {**SOURCE, "known_model": known}}
    card = model_card(replace(CONFIG, licence="other"), record)
    data = metadata(card)
    assert (data["license"], data["license_name"]) == ("other", name)
    assert link in data["license_link"]
    assert f"[{name}]({data['license_link']})" in card


def test_merged_loras_are_named_with_their_licences() -> None:
    loras = [
        {"name": "a.safetensors", "scale": 0.5, "sha256": "1", "licence": "mit"},
        {"name": "b.pt", "scale": 1.0, "sha256": "2"},
    ]
    card = model_card(CONFIG, {"source": {**SOURCE, "loras": loras}})
    assert "a.safetensors (scale 0.5), b.pt (scale 1)" in card
    assert "a.safetensors is mit" in card
    assert "b.pt is unknown" in card


@pytest.mark.parametrize(("media", "rate", "per_second"), [("demo", 8, 8), ("wan", 16, 4)])
def test_the_cache_table_is_computed_from_the_config(
    media: Any, rate: int, per_second: int
) -> None:
    config = replace(CONFIG, media=media, frames_per_second=rate)
    card, dense = model_card(config, RECORD), replace(config, mla=None)
    for seconds in (5, 30, 60):
        frames = seconds * per_second
        row = f"| {seconds} s | {frames} | {dense.cache_bytes(frames):,} "
        assert f"{row}| {config.cache_bytes(frames):,} |" in card
    assert f"| 6 | {dense.cache_bytes(6):,} | {config.cache_bytes(6):,} |" in card


def test_measured_errors_are_stated() -> None:
    card = model_card(CONFIG, {**RECORD, "recovered": {"errors": ERRORS}})
    assert "| 0 | 0.0123 | +10.00% |" in card
    assert "| 140 | 0.00456 | +2.00% |" in card
    assert "48 held-out clips (demo)" in card
    for record in ({}, {"recovered": {"kept_steps": {}}}):
        assert "velocity error" not in model_card(CONFIG, record)


def test_how_it_was_made_is_stated_without_folders() -> None:
    card = model_card(CONFIG, RECORD)
    for fact in ("dense.pt", "`abc123`", '"latents.safetensors"', '"lora.pt:0.5"', '"0.1.0"'):
        assert fact in card
    assert "/home/me" not in card
    assert "12.5" not in card


def test_the_commands_are_ready_to_paste() -> None:
    card = model_card(CONFIG, RECORD, repo="me/model")
    assert 'vmla generate "me/model" --prompt "7" -o clip.mp4' in card
    assert 'vmla.load("me/model")' in card
    assert 'pip install "vmla-convert[video]"' in card
    assert "![" not in card
    assert "VMLAPipeline" not in card
    assert "(strip.png)" in model_card(CONFIG, RECORD, strip="strip.png")
    wan = replace(CONFIG, media="wan", frames_per_second=16)
    parts = ("vae", "text_encoder", "tokenizer")
    card = model_card(wan, RECORD, repo="me/model", parts=parts)
    assert 'pip install "vmla-convert[wan,video]"' in card
    assert 'VMLAPipeline.from_pretrained("me/model")' in card
    assert 'open_media(model.config, MediaConfig("me/model"))' in card
    assert "num_frames=81" in card
    lacking = model_card(wan, RECORD, repo="me/model", parts=parts[:2])
    assert "VMLAPipeline" in lacking
    assert "MediaConfig" not in lacking


def test_an_edit_is_noticed() -> None:
    card = model_card(CONFIG, RECORD)
    assert is_untouched(card)
    for edited in (card.replace("12", "13", 1), card + "More.\n", "# Another card\n"):
        assert not is_untouched(edited)


# Local folders

SECRET = "secret-project"
# Paths of every system, as users type them.
FOLDERS = (
    *(f"{SECRET}/", f"../../{SECRET}/", f"../{SECRET}/a b/", f"~/{SECRET}/", f"~{SECRET}/"),
    *(f"/home/me/{SECRET}/", f"/{SECRET}//", f"file:///{SECRET}/", f"..\\{SECRET}\\"),
    *(f"C:\\Users\\{SECRET}\\", f"C:/{SECRET}/", f"\\\\server\\{SECRET}\\"),
)
NAMES = ("x.safetensors", "my lora.pt", "v1.2", "clips/", "x.pt:-1e-3")
PATHS = [folder + name for folder in FOLDERS for name in NAMES]


def with_path(cls: type[T], path: str) -> T:
    """A config with a path in every field that takes any text, also in future fields."""
    texts: dict[str, Any] = {}
    for name, hint in get_type_hints(cls).items():
        if hint in (str, str | None):
            texts[name] = path
        elif hint == tuple[str, ...] and name != "prompts":
            texts[name] = (path,)
    return cls(**texts)


def record_of(path: str) -> dict[str, Any]:
    """A record as `convert` and `recover` write it, and some unknown fields."""
    asked, data = to_dict(with_path(SourceConfig, path)), with_path(DataConfig, path)
    overrides = {"base_model": path, "licence": f"./{path}", "media": path}
    return {
        "source": {
            "name": "dense.pt",
            "state_key": path,
            "asked": {**asked, "overrides": overrides},
            "loras": [{"name": path, "scale": 0.5, "licence": f"./{path}", "sha256": "1"}],
        },
        "convert": to_dict(ConvertConfig(data=data)),
        "recover": to_dict(RecoverConfig(data=data)),
        "recovered": {"clips": {"files": [path]}, "errors": {**ERRORS, "source": path}},
        "more": [path, {"where": path}],
    }


# A missing folder that looks like a Hub id cannot be told from one.
@pytest.mark.parametrize("path", [path for path in PATHS if not is_repo(path)])
def test_no_field_of_a_record_or_card_shows_a_folder(path: str) -> None:
    record = record_of(path)
    config = replace(CONFIG, base_model=path, licence=f"./{path}")
    public = without_folders(record)
    for shown in (json.dumps(public), model_card(config, record), model_card(config, public)):
        assert SECRET not in shown
    assert without_folders(public) == public
    assert count(public) == count(record)
    name = re.split(r"[/\\]", path.rstrip("/"))[-1]
    assert public["more"] == [name, {"where": name}]
    kept = {"overrides": {"a": {"b": path}, "cache": {"window_frames": 12}}}
    assert without_folders(kept)["overrides"] == {"a": {"b": name}, "cache": {"window_frames": 12}}


def count(value: Any) -> int:
    """The number of values in a table."""
    if isinstance(value, dict):
        return sum(map(count, value.values()))
    return sum(map(count, value)) if isinstance(value, list | tuple) else 1


@pytest.mark.parametrize("revision", ["", "@v1", "@refs/pr/3"])
def test_hub_ids_stay_whole(revision: str) -> None:
    repo = f"Wan-AI/Wan2.1-T2V-1.3B-Diffusers{revision}"
    record = {
        "source": {
            "asked": {
                "checkpoint": repo,
                "file": "checkpoints/self_forcing_dmd.pt",
                "overrides": {"base_model": repo, "licence": "MIT/X11"},
            }
        },
        "recover": {"data": {"source": "self", "prompts": ["/imagine a cat/dog", "~"]}},
        "versions": {"torch": "2.9.0+cpu"},
    }
    assert without_folders(record) == record
    assert "checkpoints/self_forcing_dmd.pt" in model_card(CONFIG, record)
    for local in ({}, {"checkpoint": "../dense"}, {"checkpoint": "demo"}):
        assert without_folders({**local, "file": f"{SECRET}/model.pt"})["file"] == "model.pt"

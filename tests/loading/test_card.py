"""A model card says what is known, inherits what is not ours, and invents nothing."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import pytest
from checkpoints import MODEL
from huggingface_hub import ModelCard

from vmla_convert.checkpoint.hub import is_repo
from vmla_convert.config import ConvertConfig, DataConfig, MLAConfig, RecoverConfig, SourceConfig
from vmla_convert.loading.card import is_untouched, model_card, without_folders
from vmla_convert.media.clips import recorded
from vmla_convert.tables import to_dict

T = TypeVar("T")

MLA = MLAConfig(kv_lora_rank=(8, 8), rope_pairs=((0, 1), (2, 3)), init="calibrated")
CONFIG = replace(MODEL, mla=MLA, base_model="someone/dense")
RECORD: dict[str, Any] = {
    "source": {
        "name": "dense.pt",
        "sha256": "abc123",
        "known_model": None,
        "asked": {"file": None, "loras": ["/home/me/secret/lora.pt:0.5"]},
        "loras": [],
    },
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


def read(card: str) -> dict[str, Any]:
    """Its metadata, as the Hub's own library reads it."""
    return ModelCard(card).data.to_dict()


def test_the_metadata_is_what_the_hub_reads() -> None:
    assert read(model_card(CONFIG, RECORD)) == {
        "license": "apache-2.0",
        "base_model": "someone/dense",
        "library_name": "vmla-convert",
        "pipeline_tag": "text-to-video",
        "tags": ["vmla", "latent-kv-cache", "causal-video-diffusion"],
    }


def test_what_is_unknown_stays_so() -> None:
    card = model_card(replace(CONFIG, licence="unknown", base_model="unknown"), RECORD)
    assert read(card)["license"] == "unknown"
    assert "base_model" not in read(card)
    assert "**The licence of these weights is unknown**" in card


@pytest.mark.parametrize(
    ("known", "name", "link"),
    [
        ("rolling-forcing", "license-terms-of-rollingforcing", "TencentARC/RollingForcing"),
        ("skyreels-v2-df", "skywork-license", "SkyworkAI/SkyReels-V2"),
        (None, "unknown", "huggingface.co/someone/dense"),
    ],
)
def test_special_terms_are_named_and_linked(known: str | None, name: str, link: str) -> None:
    record = {**RECORD, "source": {**RECORD["source"], "known_model": known}}
    card = model_card(replace(CONFIG, licence="other"), record)
    told = read(card)
    assert (told["license"], told["license_name"]) == ("other", name)
    assert link in told["license_link"]
    assert f"[{name}]({told['license_link']})" in card


def test_merged_loras_are_named_with_their_licences() -> None:
    loras = [
        {"name": "a.safetensors", "scale": 0.5, "sha256": "1", "licence": "mit"},
        {"name": "b.pt", "scale": 1.0, "sha256": "2"},
    ]
    card = model_card(CONFIG, {**RECORD, "source": {**RECORD["source"], "loras": loras}})
    assert "a.safetensors (scale 0.5), b.pt (scale 1)" in card
    assert "The licence of the merged LoRA a.safetensors is mit." in card
    assert "The licence of the merged LoRA b.pt is unknown." in card


def test_the_cache_table_is_the_configs() -> None:
    card = model_card(CONFIG, RECORD)
    dense = replace(CONFIG, mla=None)
    for seconds in (5, 30, 60):
        frames = seconds * 8
        row = f"| {seconds} s | {frames} | {dense.cache_bytes(frames):,} "
        assert f"{row}| {CONFIG.cache_bytes(frames):,} |" in card
    window = f"| **its window** | 6 | {dense.cache_bytes(6):,} | {CONFIG.cache_bytes(6):,} |"
    assert window in card


def test_a_wan_model_has_four_latent_frames_a_second() -> None:
    wan = replace(CONFIG, media="wan", frames_per_second=16)
    assert "| 60 s | 240 |" in model_card(wan, RECORD)


def test_errors_that_were_measured_are_told() -> None:
    card = model_card(CONFIG, {**RECORD, "recovered": {"errors": ERRORS}})
    assert "| before training | 0 | 0.0123 | +10.00% |" in card
    assert "| recovered | 140 | 0.00456 | +2.00% |" in card
    assert "48 held-out clips (demo)" in card


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, "no error of the whole model was measured"),
        ({"recovered": {"kept_steps": {}}}, "No error of the whole model was measured"),
    ],
)
def test_errors_that_were_not_are_not_invented(more: dict[str, Any], said: str) -> None:
    card = model_card(CONFIG, {**RECORD, **more})
    assert said in card
    assert "| recovered |" not in card


def test_how_it_was_made_is_told_without_whose_folders_it_was_in() -> None:
    card = model_card(CONFIG, RECORD)
    assert "dense.pt" in card
    assert "`abc123`" in card
    assert '"source": "latents.safetensors"' in card
    assert '"lora.pt:0.5"' in card
    assert '"vmla_convert": "0.1.0"' in card
    assert "/home/me" not in card
    assert "12.5" not in card


SECRET = "secret-project"
# Of every system, and as users type them; few of them are absolute paths of this one.
FOLDERS = (
    f"{SECRET}/",
    f"./{SECRET}/",
    f"../../{SECRET}/",
    f"../{SECRET}/a b/",
    f"~/{SECRET}/",
    f"~{SECRET}/",
    f"/home/me/{SECRET}/",
    f"/{SECRET}//",
    f"file:///{SECRET}/",
    f"C:\\Users\\{SECRET}\\",
    f"C:/{SECRET}/",
    f"\\\\server\\{SECRET}\\",
    f"..\\{SECRET}\\",
)
NAMES = ("x.safetensors", "clips", "my lora.pt", "v1.2", "clips/", "x.pt:0.5", "x.pt:-1e-3")
PATHS = [folder + name for folder in FOLDERS for name in NAMES]


def secretly(cls: type[T], path: str) -> T:
    """A config with a path in every field that takes any text, also in those yet to come."""
    texts: dict[str, Any] = {}
    for name, hint in get_type_hints(cls).items():
        if hint in (str, str | None):
            texts[name] = path
        elif hint == tuple[str, ...] and name != "prompts":
            texts[name] = (path,)
    return cls(**texts)


def record_of(path: str) -> dict[str, Any]:
    """As `convert` and `recover` put it together of such configs, and with fields of no config."""
    asked, data = to_dict(secretly(SourceConfig, path)), secretly(DataConfig, path)
    overrides = [f"base_model={path}", f"licence=./{path}", f"media='{path}'", path]
    return {
        "source": {
            "name": "dense.pt",
            "state_key": path,
            "asked": {**asked, "overrides": overrides},
            "loras": [{"name": path, "scale": 0.5, "licence": f"./{path}", "sha256": "1"}],
        },
        "convert": to_dict(ConvertConfig(data=data)),
        "recover": to_dict(RecoverConfig(data=data)),
        "recovered": {
            "clips": {"files": [path], path: {path: 1}},
            "errors": {**ERRORS, "source": path},
        },
        "versions": {"vmla_convert": "0.1.0"},
        "more": [path, {"where": path, path: path}],
    }


# Of a folder that is not there, what looks like an id of the Hub is told by the record alone.
@pytest.mark.parametrize("path", [path for path in PATHS if not is_repo(path)])
def test_no_folder_is_told_of_whatever_field_it_is_in(path: str) -> None:
    record = record_of(path)
    config = replace(CONFIG, base_model=path, licence=f"./{path}")
    public = without_folders(record)
    for told in (json.dumps(public), model_card(config, record), model_card(config, public)):
        assert SECRET not in told
    assert without_folders(public) == public
    assert count(public) == count(record)


def count(value: Any) -> int:
    """How many values a table holds."""
    if isinstance(value, dict):
        return sum(map(count, value.values()))
    return sum(map(count, value)) if isinstance(value, list | tuple) else 1


@pytest.mark.parametrize("path", PATHS)
def test_a_local_path_becomes_its_name(path: str) -> None:
    name = re.split(r"[/\\]", path.rstrip("/"))[-1]
    source = {"asked": {"loras": [path], "overrides": [f"a.b={path}", "cache.window_frames=12"]}}
    asked = without_folders(source)["asked"]
    assert asked == {"loras": [name], "overrides": [f"a.b={name}", "cache.window_frames=12"]}
    assert without_folders({path: 1}) == {name: 1}


@pytest.mark.parametrize("revision", ["", "@v1", "@refs/pr/3"])
def test_ids_of_the_hub_stay_whole(revision: str) -> None:
    repo = f"Wan-AI/Wan2.1-T2V-1.3B-Diffusers{revision}"
    record = {
        "source": {
            "asked": {
                "checkpoint": repo,
                "file": "checkpoints/self_forcing_dmd.pt",
                "overrides": [f"base_model={repo}", f'base_model="{repo}"', "licence=MIT/X11"],
            }
        },
        "convert": {"data": {"source": "demo", "base": repo}},
        "recover": {"data": {"source": "self", "prompts": ["/imagine a cat/dog", "~"]}},
        "versions": {"torch": "2.9.0+cpu"},
    }
    assert without_folders(record) == record
    assert "checkpoints/self_forcing_dmd.pt" in model_card(CONFIG, record)


def test_a_file_is_a_path_in_a_repository_only_where_one_is_named() -> None:
    for local in ({}, {"checkpoint": "../dense"}, {"checkpoint": "demo"}):
        asked = without_folders({**local, "file": f"{SECRET}/model.pt"})
        assert asked["file"] == "model.pt"


def test_a_folder_that_looks_like_an_id_is_told_by_the_record_or_by_being_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / SECRET / "pipe").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    typed = {"base": f"{SECRET}/pipe"}
    assert without_folders(typed) == {"base": "pipe"}
    told = to_dict(recorded(DataConfig(base=typed["base"])))
    # Where somebody pushes from another folder, and the path no longer leads there.
    monkeypatch.chdir("/")
    assert without_folders(told)["base"] == "pipe"
    assert Path(told["base"]) == tmp_path / SECRET / "pipe", "for its owner it stays where it is"
    assert without_folders(typed) == typed
    for data in (DataConfig(), DataConfig(base="owner/name@v1")):
        assert recorded(data) == data


def test_keys_that_differ_by_folder_alone_are_all_kept() -> None:
    assert list(without_folders({"a/x": 1, "b/x": 2, "x": 3}).values()) == [1, 2, 3]


def test_a_base_model_that_is_none_of_the_hub_is_not_linked_to() -> None:
    card = model_card(replace(CONFIG, base_model=f"../{SECRET}/dense"), RECORD)
    assert "base_model" not in read(card)
    assert "https://huggingface.co/" not in card


def test_how_to_use_it_is_ready_to_paste() -> None:
    card = model_card(CONFIG, RECORD, repo="me/model")
    assert 'vmla generate "me/model" --prompt "7" -o clip.mp4' in card
    assert 'vmla.load("me/model")' in card
    assert 'pip install "vmla-convert[video]"' in card
    of_wan = model_card(replace(CONFIG, media="wan"), RECORD, repo="me/model")
    assert 'pip install "vmla-convert[wan,video]"' in of_wan
    assert "![" not in card
    assert "![frames of a rollout](strip.png)" in model_card(CONFIG, RECORD, strip="strip.png")


def test_a_pipelines_folder_is_shown_to_users_of_diffusers() -> None:
    card = model_card(CONFIG, RECORD, repo="me/model", parts=[])
    assert 'VMLAPipeline.from_pretrained("me/model")  # then' in card
    assert 'pipe("7", num_frames=40, output_type="pil")' in card
    assert "duration=125)" in card
    assert "VMLAPipeline" not in model_card(CONFIG, RECORD, repo="me/model")


def test_a_pipelines_own_text_encoder_and_vae_are_named() -> None:
    """To a model alone, which does not know where it came from."""
    wan = replace(CONFIG, media="wan", frames_per_second=16)
    parts = ("vae", "text_encoder", "tokenizer")
    card = model_card(wan, RECORD, repo="me/model", parts=parts)
    assert 'vmla generate "me/model" --prompt' in card
    assert 'VMLAPipeline.from_pretrained("me/model")  # then' in card
    assert 'open_media(model.config, MediaConfig("me/model"))' in card
    assert "num_frames=81" in card
    lacking = model_card(wan, RECORD, repo="me/model", parts=parts[:2])
    assert "VMLAPipeline" in lacking
    assert "MediaConfig" not in lacking


def test_an_edit_is_noticed() -> None:
    card = model_card(CONFIG, RECORD)
    assert is_untouched(card)
    assert not is_untouched(card.replace("12", "13", 1))
    assert not is_untouched(card + "More.\n")
    assert not is_untouched("# A card of another program\n")


def test_a_record_that_says_nothing_makes_a_card() -> None:
    card = model_card(CONFIG, {})
    assert read(card)["license"] == "apache-2.0"
    assert not re.search(r"\bNone\b", card)

"""Which files of a repository are fetched, of which commit, and what a user reads when that fails.

Everything runs against a Hub on the loopback.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from hub_stub import Hub, Refusal
from huggingface_hub import constants
from safetensors.torch import save

from vmla_convert.checkpoint.hub import (
    Headers,
    cached_repo,
    fetch,
    fetch_headers,
    fetch_parts,
    has_parts,
    is_repo,
)
from vmla_convert.checkpoint.source import open_source
from vmla_convert.errors import CheckpointError

pytest_plugins = ["hub_stub"]

COMMIT = "0123456789abcdef0123456789abcdef01234567"
INDEX = "diffusion_pytorch_model.safetensors.index.json"
SHARDS = [f"diffusion_pytorch_model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
WAN_EXTRAS = [
    "README.md",
    "Wan2.1_VAE.pth",
    "config.json",
    "google/umt5-xxl/tokenizer.json",
    "models_t5_umt5-xxl-enc-bf16.pth",
]
# Files of released repositories, and of some with mistakes.
REPOS: dict[str, list[str]] = {
    "Wan-AI/Wan2.1-T2V-1.3B": [*WAN_EXTRAS, "diffusion_pytorch_model.safetensors"],
    "Wan-AI/Wan2.1-T2V-14B": [*WAN_EXTRAS, INDEX, *SHARDS],
    "Wan-AI/Wan2.2-T2V-A14B": [
        *WAN_EXTRAS,
        *(f"{e}_noise_model/{f}" for e in ("high", "low") for f in ("config.json", INDEX, *SHARDS)),
    ],
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": [
        "model_index.json",
        "text_encoder/config.json",
        "text_encoder/model-00001-of-00002.safetensors",
        "text_encoder/model-00002-of-00002.safetensors",
        "text_encoder/model.safetensors.index.json",
        "tokenizer/tokenizer.json",
        "transformer/config.json",
        *(f"transformer/{f}" for f in (INDEX, *SHARDS)),
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ],
    "someone/A14B-Diffusers": [
        f"{part}/{f}" for part in ("transformer", "transformer_2") for f in (INDEX, *SHARDS)
    ],
    "gdhe17/Self-Forcing": [
        "README.md",
        "checkpoints/ode_init.pt",
        "checkpoints/self_forcing_dmd.pt",
        "checkpoints/self_forcing_sid.pt",
    ],
    "krea/krea-realtime-video": [
        "krea-realtime-video-14b.safetensors",
        "transformer/config.json",
        *(f"transformer/{f}" for f in (INDEX, *SHARDS)),
    ],
    "Hidir/VideoMLA": ["README.md", "checkpoints/stage3_la6_sink1/model.pt"],
    "someone/sizes": ["README.md", "a.safetensors", "b.safetensors"],
    "someone/trainings": [f"step_{i:02}/model.pt" for i in range(12)],
    "someone/finetune": [
        "config.json",
        "model.safetensors",
        "old.pt",
        "lora.safetensors",
        "x/1.pt",
    ],
    "someone/both": ["model.safetensors", *(f"transformer/{f}" for f in (INDEX, *SHARDS))],
    "someone/codec": ["codec.safetensors", "conversion.json", "model.safetensors"]
    + [f"transformer/{f}" for f in (INDEX, *SHARDS)],
    "someone/lora": ["adapter_config.json", "pytorch_lora_weights.safetensors"],
    "someone/text": ["README.md", "vae/diffusion_pytorch_model.safetensors"],
    "someone/loose": ["transformer/config.json", *(f"transformer/{s}" for s in SHARDS)],
    "someone/outside": [INDEX, *SHARDS],
    "someone/absolute": [INDEX, *SHARDS],
    "someone/garbled": [INDEX, *SHARDS],
    "someone/shardless": [INDEX, SHARDS[0]],
}
WEIGHT_MAPS: dict[str, object] = {
    "someone/outside": {"weight_map": {"a": "../../secret.safetensors"}},
    "someone/absolute": {"weight_map": {"a": "/etc/model.safetensors"}},
    "someone/garbled": ["no table"],
}
REPO, FILE = "gdhe17/Self-Forcing", "checkpoints/self_forcing_dmd.pt"


def put(stub: Hub, repo: str) -> None:
    index = WEIGHT_MAPS.get(repo, {"weight_map": {name: name for name in SHARDS}})
    text = json.dumps(index).encode()
    stub.put(repo, {file: text if file.endswith(INDEX) else b"{}" for file in REPOS[repo]})


def cached() -> set[str]:
    """The files in the cache, by their paths in the repository."""
    snapshots = Path(constants.HF_HUB_CACHE).glob("*/snapshots/*")
    return {
        file.relative_to(root).as_posix()
        for root in snapshots
        for file in root.rglob("*")
        if file.is_file()
    }


def refused(repo: str, file: str | None, *facts: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        fetch(repo, file)
    message, hint = caught.value.message, caught.value.hint
    assert hint
    assert "\n" not in message + hint
    for fact in facts:
        assert fact in f"{message} ({hint})"


@pytest.mark.parametrize(
    "name",
    [
        *("gdhe17/Self-Forcing", "Wan-AI/Wan2.1-T2V-1.3B", "a/b", "a/b@main", "a/b@refs/pr/3"),
        *(f"a/b@{COMMIT}", "runs/quickstart"),
    ],
)
def test_hub_ids_are_recognised(name: str) -> None:
    assert is_repo(name)


@pytest.mark.parametrize(
    "name",
    [
        *("", "model", "./a/b", "../b", "/a/b", "a/b/", "a/b/c", "~/b", "a\\b", "a/b c", "a/b@"),
        *("a/b@../../c", "a--b/c", "a..b/c", "a/b.", "-a/b", "a/b.git", "a/b\n", "é/b"),
        *("runs/model.pt", "runs/model.safetensors", "runs/model.safetensors.index.json"),
        "a/" + "b" * 96,
    ],
)
def test_paths_are_not_taken_for_hub_ids(name: str) -> None:
    assert not is_repo(name)


@pytest.mark.parametrize(
    ("repo", "file", "chosen"),
    [
        ("Wan-AI/Wan2.1-T2V-1.3B", None, "diffusion_pytorch_model.safetensors"),
        ("Wan-AI/Wan2.1-T2V-14B", None, INDEX),
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", None, f"transformer/{INDEX}"),
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "transformer", f"transformer/{INDEX}"),
        ("Wan-AI/Wan2.2-T2V-A14B", "low_noise_model/", f"low_noise_model/{INDEX}"),
        ("someone/A14B-Diffusers", f"transformer_2/{INDEX}", f"transformer_2/{INDEX}"),
        (REPO, None, FILE),
        (REPO, "./checkpoints/self_forcing_sid.pt", "checkpoints/self_forcing_sid.pt"),
        ("krea/krea-realtime-video", None, "krea-realtime-video-14b.safetensors"),
        ("krea/krea-realtime-video", "transformer", f"transformer/{INDEX}"),
        ("Hidir/VideoMLA", None, "checkpoints/stage3_la6_sink1/model.pt"),
        ("someone/finetune", None, "model.safetensors"),
        ("someone/finetune", "old.pt", "old.pt"),
        ("someone/both", None, f"transformer/{INDEX}"),
        ("someone/codec", None, "codec.safetensors"),
        ("someone/codec", "transformer", f"transformer/{INDEX}"),
        ("someone/lora", None, "pytorch_lora_weights.safetensors"),
    ],
)
def test_the_checkpoint_is_chosen_with_its_shards_and_settings(
    repo: str, file: str | None, chosen: str, stub: Hub
) -> None:
    put(stub, repo)
    path = fetch(repo, file)
    assert path.as_posix().endswith(f"/snapshots/{stub.repos[repo].head}/{chosen}")
    assert cached_repo(path) == f"{repo}@{stub.repos[repo].head}"
    folder = chosen.rpartition("/")[0]
    names = ["config.json", "conversion.json", "adapter_config.json"]
    names += SHARDS if chosen.endswith(INDEX) else []
    beside = {f"{folder}/{name}".lstrip("/") for name in names}
    assert cached() == {chosen} | (beside & set(REPOS[repo]))


@pytest.mark.parametrize(
    ("repo", "file", "facts"),
    [
        (
            "Wan-AI/Wan2.2-T2V-A14B",
            None,
            ["high_noise_model, low_noise_model", "--file high_noise_model", "source.file"],
        ),
        ("someone/A14B-Diffusers", None, ["transformer, transformer_2", "--file transformer_2"]),
        ("someone/sizes", None, ["a.safetensors, b.safetensors", "--file a.safetensors"]),
        ("someone/trainings", None, ["12", "step_07/model.pt and 4 more"]),
        (REPO, "checkpoints", ["3", f"checkpoints/ of {REPO}", "--file checkpoints/ode_init.pt"]),
        (REPO, "checkpoints/self_forcing_dmb.pt", ["self_forcing_dmb.pt", f"'{FILE}'"]),
        (REPO, "../secret.pt", ["../secret.pt"]),
        (REPO, "README.md", ["'README.md'", ".safetensors, .pt"]),
        ("someone/text", None, ["someone/text", ".safetensors"]),
        ("someone/text", "x.pt", ["'x.pt'", "https://huggingface.co/someone/text/tree/main"]),
        ("someone/loose", "transformer", ["transformer/ of someone/loose"]),
        ("someone/outside", None, [f"'{INDEX}'", "../../secret.safetensors"]),
        ("someone/absolute", None, [f"'{INDEX}'", "/etc/model.safetensors"]),
        ("someone/garbled", None, [f"'{INDEX}'"]),
        ("someone/shardless", None, [SHARDS[1]]),
    ],
)
def test_a_repository_without_one_clear_checkpoint_is_refused(
    repo: str, file: str | None, facts: list[str], stub: Hub
) -> None:
    put(stub, repo)
    refused(repo, file, *facts)
    assert not any(name.endswith((".safetensors", ".pt")) for name in cached())


def test_a_name_that_is_not_an_id_is_refused() -> None:
    refused("./a/b", None, "'./a/b'", "owner/name@revision")


LOGIN, TERMS = "hf auth login", f"https://huggingface.co/{REPO}"
REFUSALS = {
    "gated": (403, "GatedRepo", "no", [REPO, TERMS, LOGIN]),
    "no such repository": (401, "RepoNotFound", "no", [REPO, LOGIN]),
    "no such revision": (404, "RevisionNotFound", "no", ["'v9'", f"{TERMS}/commits"]),
    "disabled": (403, "", "Access to this resource is disabled.", [f"disabled {REPO}"]),
    "bad token": (401, "", "Invalid credentials in Authorization header", [REPO, LOGIN]),
    "no rights": (403, "", "no", [REPO, LOGIN]),
}


@pytest.mark.parametrize("kind", REFUSALS)
@pytest.mark.parametrize("path", ["/api/models/*", "*/resolve/*"])
def test_a_refusal_of_the_hub_is_told_with_its_remedy(kind: str, path: str, stub: Hub) -> None:
    put(stub, REPO)
    stub.repos[REPO].tags["v9"] = stub.repos[REPO].head
    status, code, message, facts = REFUSALS[kind]
    for method in ("GET", "HEAD"):
        stub.refusals.append(Refusal(method, path, status, message, code))
    refused(f"{REPO}@v9", None, *facts)


def test_a_hub_that_is_away_is_told_with_its_remedy(
    stub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(stub, REPO)
    stub.refusals.append(Refusal("GET", "/api/models/*", 503))
    refused(REPO, FILE, REPO, "Hub's cache", "error 503")
    stub.refusals[:] = [Refusal("HEAD", "*/resolve/*", 503)]
    refused(REPO, FILE, REPO, "Hub's cache", "error 503")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    refused(REPO, FILE, REPO, "Hub's cache", "cannot be reached", "give its path")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(REPO, FILE, REPO, "Hub's cache", "HF_HUB_OFFLINE", "unset it")


def test_a_download_that_breaks_off_says_why(stub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    put(stub, REPO)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    refused(REPO, None, REPO, "No space left on device", "whole files are kept")


@pytest.mark.parametrize("tree_is_away", [False, True])
def test_an_incomplete_cache_is_not_taken_for_a_whole_one(
    tree_is_away: bool, stub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(stub, "Wan-AI/Wan2.1-T2V-14B")
    index = fetch("Wan-AI/Wan2.1-T2V-14B")
    (index.parent / SHARDS[1]).unlink()
    if tree_is_away:  # snapshot_download then returns the folder as it is
        folder = str(index.parent)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: folder)
    else:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("Wan-AI/Wan2.1-T2V-14B", None, SHARDS[1], "Hub's cache")


def test_without_the_hub_the_cache_serves(stub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    put(stub, REPO)
    path = fetch(REPO)
    commit = stub.repos[REPO].head
    for away in ("unreachable", "offline"):
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", away == "offline")
        for revision in ("", "@main", f"@{commit}"):
            for file in (None, FILE, "checkpoints"):
                assert fetch(f"{REPO}{revision}", file) == path
        assert has_parts(REPO, "checkpoints/")
        assert not has_parts(REPO, "vae/")
    refused("someone/else", None, "someone/else", "neither a path here")
    refused(f"{REPO}@v2", None, REPO, "neither a path here")
    refused(REPO, "checkpoints/x.pt", "'checkpoints/x.pt'", "Hub's cache")
    path.resolve().unlink()  # an interrupted download
    refused(REPO, None, REPO, "neither a path here")


def test_parts_are_files_and_whole_folders(stub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    put(stub, repo)
    root = fetch_parts(repo, "text_encoder/", "vae/config.json")
    encoder = {file for file in REPOS[repo] if file.startswith("text_encoder/")}
    assert cached() == encoder | {"vae/config.json"}
    for part in ("vae", "scheduler/"):
        with pytest.raises(CheckpointError, match=f"'{part}'") as caught:
            fetch_parts(repo, part)
        assert f"https://huggingface.co/{repo}" in caught.value.hint
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch_parts(repo, "text_encoder/") == root
    with pytest.raises(CheckpointError, match=f"'tokenizer/' of {repo} is not in the"):
        fetch_parts(repo, "tokenizer/")


# A repository that changes while it is read

MOVING = "someone/moving"


def version(number: int) -> dict[str, bytes]:
    """A checkpoint; every file says which version it belongs to."""
    shards = {name: f"x-0000{i}-of-00002.safetensors" for i, name in enumerate("ab", 1)}
    files = {"x.safetensors.index.json": json.dumps({"weight_map": shards, "version": number})}
    files["config.json"] = json.dumps({"version": number})
    weights = {file: save({name: torch.full((number,), 1.0)}) for name, file in shards.items()}
    return weights | {name: text.encode() for name, text in files.items()}


def versions_in(folder: Path) -> set[int]:
    texts = (json.loads(file.read_text())["version"] for file in folder.glob("*.json"))
    shards = (next(iter(open_source(f).specs().values())) for f in folder.glob("*.safetensors"))
    return {*texts, *(spec.shape[0] for spec in shards)}


def fetched() -> set[int]:
    return versions_in(fetch(MOVING).parent)


def parts_fetched() -> set[int]:
    return versions_in(fetch_parts(MOVING, *version(1)))


def headers_fetched() -> set[int]:
    found = fetch_headers(MOVING)
    assert isinstance(found, Headers)
    assert found.config is not None
    read = {json.loads(found.config.read_text())["version"]}
    return read | {spec.shape[0] for spec in found.source.specs().values()}


@pytest.mark.parametrize("read", [fetched, parts_fetched, headers_fetched])
def test_all_files_are_of_one_commit_whenever_somebody_pushes(
    read: Callable[[], set[int]], stub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A push comes before the first request, then before the second, and so on."""
    seen: list[int] = []
    asked = SimpleNamespace(before=0, pushed=True)

    def push() -> None:
        if len(stub.asked) == asked.before:
            asked.pushed = True
            stub.put(MOVING, version(2))

    stub.meanwhile = push
    while asked.pushed:
        asked.before, asked.pushed = asked.before + 1, False
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / str(asked.before)))
        stub.repos.clear()
        stub.asked.clear()
        stub.put(MOVING, version(1))
        found = read()
        assert len(found) == 1, f"a push before request {asked.before} mixed {found}"
        seen += found
    assert len(seen) > 5
    # A push before the listing gives the new version, every later one the old version.
    assert seen == [2, *[1] * (len(seen) - 1)]


def test_a_revision_is_remembered_in_the_cache(stub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = stub.put(MOVING, version(1))
    first = repo.head
    repo.tags["v1"] = first
    assert fetched() == {1}
    stub.put(MOVING, version(2))
    names = {MOVING: 2, f"{MOVING}@main": 2, f"{MOVING}@v1": 1, f"{MOVING}@{first}": 1}
    for name in (MOVING, f"{MOVING}@v1"):
        fetch(name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name, number in names.items():
        assert versions_in(fetch(name).parent) == {number}
        assert versions_in(fetch_parts(name, *version(1))) == {number}
    # Other programs that share the cache find the same files.
    other = huggingface_hub.hf_hub_download(MOVING, "config.json", local_files_only=True)
    assert json.loads(Path(other).read_text()) == {"version": 2}


def broken_off(stub: Hub) -> None:
    stub.refusals.append(Refusal("GET", "*-00002-of-00002.safetensors", 500))
    with pytest.raises(CheckpointError):
        fetch(MOVING)


@pytest.mark.parametrize("look", [broken_off, lambda _: headers_fetched()])
def test_an_older_whole_version_stays_in_use_until_the_new_one_is_whole(
    look: Callable[[Hub], object], stub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub.put(MOVING, version(1))
    fetch(MOVING)
    stub.put(MOVING, version(2))
    look(stub)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetched() == {1}


def test_a_cache_without_write_access_serves(stub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    stub.put(MOVING, version(1))
    fetch(f"{MOVING}@{stub.repos[MOVING].head}")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "replace", refuse)
    assert fetched() == {1}

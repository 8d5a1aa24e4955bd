"""Which file of a repository is fetched, and what is said when it cannot be; all offline."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from hub_stub import Hub, Refusal
from huggingface_hub import constants, errors
from safetensors.torch import save, save_file

from vmla_convert.checkpoint.hub import Headers, fetch, fetch_headers, fetch_parts, is_repo
from vmla_convert.checkpoint.source import open_source
from vmla_convert.errors import CheckpointError

pytest_plugins = ["hub_stub"]

COMMIT = "0123456789abcdef0123456789abcdef01234567"
INDEX = "diffusion_pytorch_model.safetensors.index.json"
SHARDS = [f"diffusion_pytorch_model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
WAN_EXTRAS = [
    ".gitattributes",
    "README.md",
    "Wan2.1_VAE.pth",
    "config.json",
    "google/umt5-xxl/tokenizer.json",
    "models_t5_umt5-xxl-enc-bf16.pth",
]

# What the repositories of checkpoint-formats 1.1 hold.
REPOS: dict[str, list[str]] = {
    "Wan-AI/Wan2.1-T2V-1.3B": [*WAN_EXTRAS, "diffusion_pytorch_model.safetensors"],
    "Wan-AI/Wan2.1-T2V-14B": [*WAN_EXTRAS, INDEX, *SHARDS],
    "Wan-AI/Wan2.2-T2V-A14B": [
        *WAN_EXTRAS,
        *(f"{e}_noise_model/{f}" for e in ("high", "low") for f in ("config.json", INDEX, *SHARDS)),
    ],
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": [
        "model_index.json",
        "scheduler/scheduler_config.json",
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
        "checkpoints/self_forcing_10s.pt",
        "checkpoints/self_forcing_dmd.pt",
        "checkpoints/self_forcing_sid.pt",
    ],
    "tianweiy/CausVid": [
        "autoregressive_checkpoint/model.pt",
        "bidirectional_checkpoint1/model.pt",
        "bidirectional_checkpoint2/model.pt",
        "wan_causal_ode_checkpoint_model_003000/model.pt",
    ],
    "Efficient-Large-Model/LongLive-1.3B": ["models/longlive_base.pt", "models/lora.pt"],
    "krea/krea-realtime-video": [
        "krea-realtime-video-14b.safetensors",
        "transformer/config.json",
        "transformer/causal_model.py",
        *(f"transformer/{f}" for f in (INDEX, *SHARDS)),
    ],
    "Skywork/SkyReels-V2-DF-1.3B-540P": ["config.json", "model.safetensors"],
    "Hidir/VideoMLA": ["README.md", "checkpoints/stage3_la6_sink1/model.pt"],
    "someone/sizes": ["README.md", "a.safetensors", "b.safetensors"],
    "someone/trainings": [f"step_{i:02}/model.pt" for i in range(12)],
    "someone/finetune": [
        "config.json",
        "model.safetensors",
        "old.pt",
        "lora.safetensors",
        "steps/1.pt",
    ],
    "someone/both": ["model.safetensors", *(f"transformer/{f}" for f in (INDEX, *SHARDS))],
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


class FakeHub:
    """Answers for `REPOS` as the Hub would, and remembers what was taken."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.taken: list[str] = []
        self.listed: set[str] = set()
        self.revisions: set[str] = set()
        self.listing_error: Exception | None = None
        self.download_error: Exception | None = None

    def model_info(self, repo: str, *, revision: str, timeout: float) -> object:
        assert timeout > 0
        if self.listing_error is not None:
            raise self.listing_error
        self.listed.add(revision)
        files = [SimpleNamespace(rfilename=f) for f in REPOS[repo]]
        return SimpleNamespace(sha=COMMIT, siblings=files)

    def download(self, repo: str, file: str, *, revision: str, local_files_only: bool) -> str:
        assert not local_files_only
        assert file in REPOS[repo]
        if self.download_error is not None:
            raise self.download_error
        self.revisions.add(revision)
        self.taken.append(file)
        path = self.folder / repo / file
        path.parent.mkdir(parents=True, exist_ok=True)
        weight_map = {"weight_map": {name: name for name in SHARDS}}
        path.write_text(json.dumps(WEIGHT_MAPS.get(repo, weight_map)))
        return str(path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake.download)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    return fake


@pytest.mark.parametrize(
    "name",
    [
        "gdhe17/Self-Forcing",
        "Wan-AI/Wan2.1-T2V-1.3B",
        "a/b",
        "a/b@main",
        "a/b@refs/pr/3",
        f"a/b@{COMMIT}",
        "runs/quickstart",
    ],
)
def test_hub_ids_are_known_as_such(name: str) -> None:
    assert is_repo(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "model",
        "./a/b",
        "../b",
        "/a/b",
        "a/b/",
        "a/b/c",
        "~/b",
        "a\\b",
        "a/b c",
        "a/b@",
        "a/b@../../c",
        "a--b/c",
        "a..b/c",
        "a/b.",
        "-a/b",
        "a/b.git",
        "runs/model.pt",
        "runs/model.pth",
        "runs/model.safetensors",
        "runs/model.safetensors.index.json",
        "a/b\n",
        "é/b",
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
        ("Wan-AI/Wan2.2-T2V-A14B", "low_noise_model", f"low_noise_model/{INDEX}"),
        ("Wan-AI/Wan2.2-T2V-A14B", "low_noise_model/", f"low_noise_model/{INDEX}"),
        ("someone/A14B-Diffusers", f"transformer_2/{INDEX}", f"transformer_2/{INDEX}"),
        ("gdhe17/Self-Forcing", None, "checkpoints/self_forcing_dmd.pt"),
        (
            "gdhe17/Self-Forcing",
            "./checkpoints/self_forcing_sid.pt",
            "checkpoints/self_forcing_sid.pt",
        ),
        ("tianweiy/CausVid", None, "autoregressive_checkpoint/model.pt"),
        ("Efficient-Large-Model/LongLive-1.3B", None, "models/longlive_base.pt"),
        ("Efficient-Large-Model/LongLive-1.3B", "models/lora.pt", "models/lora.pt"),
        ("krea/krea-realtime-video", None, "krea-realtime-video-14b.safetensors"),
        ("krea/krea-realtime-video", "transformer", f"transformer/{INDEX}"),
        ("Skywork/SkyReels-V2-DF-1.3B-540P", None, "model.safetensors"),
        ("Hidir/VideoMLA", None, "checkpoints/stage3_la6_sink1/model.pt"),
        ("someone/finetune", None, "model.safetensors"),
        ("someone/finetune", "old.pt", "old.pt"),
        ("someone/both", None, f"transformer/{INDEX}"),
    ],
)
def test_the_checkpoint_is_picked_with_what_belongs_to_it(
    repo: str, file: str | None, chosen: str, hub: FakeHub
) -> None:
    assert fetch(repo, file) == hub.folder / repo / chosen
    folder = chosen.rpartition("/")[0]
    beside = [f"{folder}/{name}".lstrip("/") for name in ("config.json", *SHARDS)]
    wanted = {chosen, *(beside[1:] if chosen.endswith(INDEX) else [])}
    assert set(hub.taken) == wanted | ({beside[0]} & set(REPOS[repo]))
    assert hub.taken.index(chosen) <= 1, "shards come after the index that names them"


def test_the_revision_is_the_one_that_was_asked_for(hub: FakeHub) -> None:
    fetch("Wan-AI/Wan2.1-T2V-14B@v1")
    assert hub.listed == {"v1"}
    hub.listed.clear()
    fetch("Wan-AI/Wan2.1-T2V-14B")
    assert hub.listed == {"main"}
    assert hub.revisions == {COMMIT}, "what it meant when it was listed"


def refused(repo: str, file: str | None = None) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        fetch(repo, file)
    error = caught.value
    assert error.hint
    assert "\n" not in error.message + error.hint
    assert not error.message.endswith(".")
    return error


@pytest.mark.parametrize(
    ("repo", "file", "message", "hint"),
    [
        (
            "Wan-AI/Wan2.2-T2V-A14B",
            None,
            f"Wan-AI/Wan2.2-T2V-A14B holds 2 checkpoints: high_noise_model/{INDEX}, "
            f"low_noise_model/{INDEX}",
            f"it is a pair of experts, converted one by one: add --file high_noise_model/{INDEX}; "
            "in a recipe: source.file",
        ),
        (
            "someone/A14B-Diffusers",
            None,
            f"someone/A14B-Diffusers holds 2 checkpoints: transformer/{INDEX}, "
            f"transformer_2/{INDEX}",
            f"it is a pair of experts, converted one by one: add --file transformer/{INDEX}; "
            "in a recipe: source.file",
        ),
        (
            "someone/sizes",
            None,
            "someone/sizes holds 2 checkpoints: a.safetensors, b.safetensors",
            "add --file a.safetensors, or another of them; in a recipe: source.file",
        ),
        (
            "someone/trainings",
            None,
            "someone/trainings holds 12 checkpoints: "
            + ", ".join(f"step_{i:02}/model.pt" for i in range(8))
            + " and 4 more",
            "add --file step_00/model.pt, or another of them; in a recipe: source.file",
        ),
        (
            "gdhe17/Self-Forcing",
            "checkpoints",
            "checkpoints/ of gdhe17/Self-Forcing holds 4 checkpoints: checkpoints/ode_init.pt, "
            "checkpoints/self_forcing_10s.pt, checkpoints/self_forcing_dmd.pt, "
            "checkpoints/self_forcing_sid.pt",
            "add --file checkpoints/ode_init.pt, or another of them; in a recipe: source.file",
        ),
        (
            "gdhe17/Self-Forcing",
            "checkpoints/self_forcing_dmb.pt",
            "gdhe17/Self-Forcing has no file 'checkpoints/self_forcing_dmb.pt'",
            "did you mean 'checkpoints/self_forcing_dmd.pt'?",
        ),
        (
            "gdhe17/Self-Forcing",
            "../secret.pt",
            "gdhe17/Self-Forcing has no file '../secret.pt'",
            "known: checkpoints/ode_init.pt, checkpoints/self_forcing_10s.pt, "
            "checkpoints/self_forcing_dmd.pt, checkpoints/self_forcing_sid.pt",
        ),
        (
            "gdhe17/Self-Forcing",
            "README.md",
            "'README.md' of gdhe17/Self-Forcing is not a checkpoint",
            "known endings: .safetensors.index.json, .safetensors, .pt, .pth, .bin, .ckpt",
        ),
        (
            "someone/text",
            None,
            "someone/text holds nothing that can be loaded",
            "name a repository with an index of shards, a .safetensors file or a torch pickle",
        ),
        (
            "someone/text",
            "x.pt",
            "someone/text has no file 'x.pt'",
            "see https://huggingface.co/someone/text/tree/main",
        ),
        (
            "someone/loose",
            "transformer",
            "transformer/ of someone/loose holds nothing that can be loaded",
            "name a repository with an index of shards, a .safetensors file or a torch pickle",
        ),
        (
            "someone/outside",
            None,
            f"'{INDEX}' of someone/outside points outside its folder: ../../secret.safetensors",
            "do not use this checkpoint",
        ),
        (
            "someone/absolute",
            None,
            f"'{INDEX}' of someone/absolute points outside its folder: /etc/model.safetensors",
            "do not use this checkpoint",
        ),
        (
            "someone/garbled",
            None,
            f"'{INDEX}' of someone/garbled is not a safetensors index",
            "tell its authors, or name another with --file",
        ),
        (
            "someone/shardless",
            None,
            f"'{INDEX}' of someone/shardless needs {SHARDS[1]}, which is not there",
            "tell its authors, or name another with --file",
        ),
        (
            "./a/b",
            None,
            "'./a/b' is no Hub id",
            "give it as owner/name or owner/name@revision",
        ),
    ],
)
def test_what_cannot_be_picked_is_refused(
    repo: str, file: str | None, message: str, hint: str, hub: FakeHub
) -> None:
    error = refused(repo, file)
    assert (error.message, error.hint) == (message, hint)
    assert not any(name.endswith(".safetensors") for name in hub.taken), "nothing large is taken"


def http(kind: type[errors.HfHubHTTPError], status: int) -> errors.HfHubHTTPError:
    response: Any = SimpleNamespace(headers={}, request=None, status_code=status)
    return kind(f"{status} Client Error.\n\nat some url", response=response)


def lost(cause: Exception) -> errors.LocalEntryNotFoundError:
    error = errors.LocalEntryNotFoundError("not here")
    error.__cause__ = cause
    return error


REPO, FILE = "gdhe17/Self-Forcing", "checkpoints/self_forcing_dmd.pt"
LOGIN = "log in with a token that may read it: hf auth login"
ELSEWHERE = "connect and try again, or download it elsewhere and give its path"
REFUSALS = [
    (
        http(errors.GatedRepoError, 403),
        f"{REPO} is only for those who accepted its terms",
        f"accept them at https://huggingface.co/{REPO}, then: hf auth login",
    ),
    (
        http(errors.RepositoryNotFoundError, 401),
        f"there is no repository {REPO} on the Hub, or it is private",
        "check the name, also if it is meant as a path; if it is private: hf auth login",
    ),
    (
        http(errors.RevisionNotFoundError, 404),
        f"{REPO} has no revision 'v9'",
        f"leave it out for the newest, or see https://huggingface.co/{REPO}/commits/main",
    ),
    (
        http(errors.DisabledRepoError, 403),
        f"the Hub has disabled {REPO}",
        f"see https://huggingface.co/{REPO}",
    ),
    (http(errors.HfHubHTTPError, 401), f"the Hub does not let you read {REPO}", LOGIN),
    (http(errors.HfHubHTTPError, 403), f"the Hub does not let you read {REPO}", LOGIN),
]


@pytest.mark.parametrize(("error", "message", "hint"), REFUSALS)
def test_a_refusal_of_the_hub_is_told_in_one_sentence(
    error: Exception, message: str, hint: str, hub: FakeHub
) -> None:
    hub.listing_error = error
    told = refused(f"{REPO}@v9")
    assert (told.message, told.hint) == (message, hint)
    hub.listing_error, hub.download_error = None, error
    assert refused(f"{REPO}@v9").message == message
    hub.download_error = lost(error)  # what hf_hub_download makes of some of them
    assert refused(f"{REPO}@v9").message == message


@pytest.mark.parametrize(
    ("error", "why", "hint"),
    [
        (OSError("Name or service not known"), "the Hub cannot be reached", ELSEWHERE),
        (ValueError("a login page, no JSON"), "the Hub cannot be reached", ELSEWHERE),
        (http(errors.HfHubHTTPError, 503), "the Hub answers with error 503", ELSEWHERE),
        (
            errors.OfflineModeIsEnabled("offline"),
            "HF_HUB_OFFLINE is set",
            "unset it, or download it elsewhere and give its path",
        ),
    ],
)
def test_without_the_hub_what_lacks_is_named(
    error: Exception, why: str, hint: str, hub: FakeHub
) -> None:
    hub.listing_error = error
    told = refused(REPO, FILE)
    assert (told.message, told.hint) == (
        f"{REPO} is neither a path here nor in the Hub's cache, and {why}",
        hint,
    )
    hub.listing_error, hub.download_error = None, lost(error)
    told = refused(REPO)
    assert (told.message, told.hint) == (
        f"'{FILE}' of {REPO} is not in the Hub's cache, and {why}",
        hint,
    )


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (RuntimeError("xet\nat 0x1"), "xet"),
        (RuntimeError(), "RuntimeError"),
        (http(errors.RemoteEntryNotFoundError, 404), "404 Client Error."),
    ],
)
def test_a_download_that_breaks_off_says_why(error: Exception, why: str, hub: FakeHub) -> None:
    hub.download_error = error
    with pytest.raises(CheckpointError) as caught:
        fetch(REPO)
    assert caught.value.message == f"'{FILE}' of {REPO} could not be downloaded: {why}"
    assert caught.value.hint == "try again; whole files are kept"


Put = Callable[[str, str, bytes], None]


@pytest.fixture
def put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Put:
    """Writes into a cache of the Hub's own layout, which is then all that can be reached."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def write(repo: str, file: str, content: bytes) -> None:
        folder = cache / f"models--{repo.replace('/', '--')}"
        blob = folder / "blobs" / f"{len(list(folder.glob('blobs/*'))):064}"
        link = folder / "snapshots" / COMMIT / file
        reference = folder / "refs" / "main"
        for path in (blob, link, reference):
            path.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link.symlink_to(blob)
        reference.write_text(COMMIT)

    return write


def pickled(tmp_path: Path) -> bytes:
    torch.save({"generator_ema": {"model.a": torch.arange(3.0)}}, tmp_path / "x")
    return (tmp_path / "x").read_bytes()


def packed(tmp_path: Path, name: str) -> bytes:
    save_file({name: torch.arange(3.0)}, tmp_path / "x")
    return (tmp_path / "x").read_bytes()


def snapshot(tmp_path: Path, repo: str) -> Path:
    return tmp_path / "cache" / f"models--{repo.replace('/', '--')}" / "snapshots" / COMMIT


@pytest.mark.parametrize("revision", ["", "@main", f"@{COMMIT}"])
def test_a_cached_pickle_needs_no_network(revision: str, put: Put, tmp_path: Path) -> None:
    put(REPO, FILE, pickled(tmp_path))
    for file in (None, FILE, "checkpoints"):
        path = fetch(REPO + revision, file)
        assert path == snapshot(tmp_path, REPO) / FILE
        source = open_source(path)
        assert torch.equal(source.read("model.a"), torch.arange(3.0))


def test_cached_shards_need_no_network(put: Put, tmp_path: Path) -> None:
    repo, folder = "someone/Causal-Diffusers", "transformer"
    weight_map = {"a": "x-00001-of-00002.safetensors", "b": "x-00002-of-00002.safetensors"}
    index = f"{folder}/x{'.safetensors.index.json'}"
    put(repo, index, json.dumps({"weight_map": weight_map}).encode())
    put(repo, f"{folder}/config.json", b"{}")
    put(repo, f"{folder}/{weight_map['a']}", packed(tmp_path, "a"))
    put(repo, "vae/x.safetensors", packed(tmp_path, "v"))
    error = refused(repo)
    assert error.message.startswith(f"'{folder}/{weight_map['b']}' of {repo} is not in the Hub's")
    put(repo, f"{folder}/{weight_map['b']}", packed(tmp_path, "b"))
    path = fetch(repo)
    assert path == snapshot(tmp_path, repo) / index
    assert (path.parent / "config.json").is_file()
    assert open_source(path).specs().keys() == {"a", "b"}


def test_the_cache_is_used_when_the_hub_is_down(
    put: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put("someone/one", "model.safetensors", packed(tmp_path, "a"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    down = FakeHub(tmp_path)
    down.listing_error = OSError("Name or service not known")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: down)
    download = huggingface_hub.hf_hub_download

    def local(*args: str, revision: str, local_files_only: bool) -> str:
        assert local_files_only, "with no network every look at it costs time"
        return download(*args, revision=revision, local_files_only=True)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", local)
    path = fetch("someone/one")
    assert open_source(path).specs().keys() == {"a"}


@pytest.mark.parametrize(
    ("repo", "file", "lacking"),
    [
        ("someone/else", None, "someone/else is neither a path here nor"),
        (f"{REPO}@v2", None, f"{REPO} is neither a path here nor"),
        (REPO, None, f"'{FILE}' of {REPO} is not"),
        (REPO, "checkpoints/x.pt", f"'checkpoints/x.pt' of {REPO} is not"),
        ("someone/cards", None, "a checkpoint of someone/cards is not"),
    ],
)
def test_what_the_cache_lacks_is_named(
    repo: str, file: str | None, lacking: str, put: Put, tmp_path: Path
) -> None:
    put(REPO, "checkpoints/self_forcing_sid.pt", pickled(tmp_path))
    put("someone/cards", "README.md", b"")
    error = refused(repo, file)
    assert error.message == f"{lacking} in the Hub's cache, and HF_HUB_OFFLINE is set"


def test_an_interrupted_download_does_not_count(put: Put, tmp_path: Path) -> None:
    put(REPO, FILE, pickled(tmp_path))
    (snapshot(tmp_path, REPO) / FILE).resolve().unlink()
    assert refused(REPO).message.startswith(f"{REPO} is neither a path here nor in the Hub's cache")


class TestParts:
    def test_are_all_files_of_a_folder(self, hub: FakeHub) -> None:
        repo = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
        root = fetch_parts(repo, "text_encoder/", "vae/config.json")
        assert root == hub.folder / repo
        assert hub.taken == [*(f for f in sorted(REPOS[repo]) if f.startswith("text_encoder/")),
                             "vae/config.json"]  # fmt: skip

    def test_are_taken_of_a_revision(self, hub: FakeHub) -> None:
        fetch_parts("Wan-AI/Wan2.1-T2V-1.3B-Diffusers@v1", "tokenizer/")
        assert (hub.listed, hub.revisions) == ({"v1"}, {COMMIT})

    def test_that_are_not_there_are_named(self, hub: FakeHub) -> None:
        for part in ("vae/", "vae/config.json"):
            with pytest.raises(CheckpointError, match=f"gdhe17/Self-Forcing has no {part}") as e:
                fetch_parts("gdhe17/Self-Forcing", part)
            assert "https://huggingface.co/gdhe17/Self-Forcing" in e.value.hint
        assert hub.taken == []

    def test_in_the_cache_serve_without_a_network(
        self, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cached = tmp_path / "cache" / "models--someone--text" / "snapshots" / COMMIT / "vae"
        cached.mkdir(parents=True)
        (cached / "config.json").write_text("{}")
        reference = tmp_path / "cache" / "models--someone--text" / "refs" / "main"
        reference.parent.mkdir()
        reference.write_text(COMMIT)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(
            huggingface_hub, "hf_hub_download", lambda _, file, **__: str(cached.parent / file)
        )
        hub.listing_error = errors.OfflineModeIsEnabled("offline")
        assert fetch_parts("someone/text", "vae/") == cached.parent
        with pytest.raises(CheckpointError, match="'tokenizer/' of someone/text is not in the"):
            fetch_parts("someone/text", "tokenizer/")


# A repository that changes while it is read

MOVING = "someone/moving"


def version(number: int) -> dict[str, bytes]:
    """A checkpoint of which every file says of which version it is."""
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


class Push:
    """Somebody pushes version after version, once before each of the requests named."""

    def __init__(self, stub: Hub, *requests: int) -> None:
        self.stub, self.requests, self.pushed = stub, requests, 1
        stub.put(MOVING, version(1))
        stub.asked.clear()
        stub.meanwhile = self

    def __call__(self) -> None:
        if len(self.stub.asked) in self.requests:
            self.pushed += 1
            self.stub.put(MOVING, version(self.pushed))


@pytest.mark.parametrize("read", [fetched, parts_fetched, headers_fetched])
def test_a_fetch_is_of_one_commit_whenever_somebody_pushes(
    read: Callable[[], set[int]], stub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    request, more = 1, True
    while more:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / str(request)))
        push = Push(stub, request)
        found = read()
        assert len(found) == 1, f"a push before request {request} mixed {found}"
        seen += found
        more = push.pushed > 1
        request += 1
    assert request > 5
    # Before the listing it is the new one, after it the old one.
    assert seen == [2, *[1] * (len(seen) - 1)]


def test_what_was_fetched_by_a_name_is_found_by_it_without_the_hub(
    stub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = stub.put(MOVING, version(1))
    first = repo.head
    repo.tags["v1"] = first
    stub.put(MOVING, version(2))
    names = {MOVING: 2, f"{MOVING}@main": 2, f"{MOVING}@v1": 1, f"{MOVING}@{first}": 1}
    for name in (MOVING, f"{MOVING}@v1"):
        fetch(name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name, number in names.items():
        assert versions_in(fetch(name).parent) == {number}
        assert versions_in(fetch_parts(name, *version(1))) == {number}
    # As every program that shares the cache finds it.
    told = huggingface_hub.hf_hub_download(MOVING, "config.json", local_files_only=True)
    assert json.loads(Path(told).read_text()) == {"version": 2}


def test_a_name_follows_its_branch(stub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (1, 2):
        stub.put(MOVING, version(number))
        assert fetched() == {number}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetched() == {2}


def test_a_fetch_that_breaks_off_leaves_what_was_whole(
    stub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub.put(MOVING, version(1))
    fetch(MOVING)
    stub.put(MOVING, version(2))
    stub.refusals.append(Refusal("GET", "*-00002-of-00002.safetensors", 500))
    with pytest.raises(CheckpointError):
        fetch(MOVING)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetched() == {1}


def test_looking_at_headers_leaves_what_was_whole(
    stub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub.put(MOVING, version(1))
    fetch(MOVING)
    stub.put(MOVING, version(2))
    assert headers_fetched() == {2}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetched() == {1}


def test_a_cache_that_cannot_be_written_to_serves(
    stub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub.put(MOVING, version(1))

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    fetch(f"{MOVING}@{stub.repos[MOVING].head}")
    monkeypatch.setattr("vmla_convert.checkpoint.hub.os.replace", refuse)
    assert fetched() == {1}

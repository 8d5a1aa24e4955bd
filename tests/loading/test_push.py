"""Push to a Hub on the loopback, and load from there by id."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from checkpoints import CLIPS, CONVERT, EVALUATE, MODEL, RECOVER, Vmla, refused
from conftest import chunk_timesteps, tiny_clip
from hub_stub import READ_TOKEN, TOKEN, Blob, Hub, Refusal
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file, save_file
from tiny_wan import SETTINGS

from vmla_convert.checkpoint.integrity import seal
from vmla_convert.checkpoint.source import fingerprint
from vmla_convert.checkpoint.writer import CheckpointWriter
from vmla_convert.config import ConvertConfig, Sizes, SourceConfig
from vmla_convert.errors import CheckpointError, ConfigError, OutputError
from vmla_convert.fitting.convert import convert
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.loading import publish
from vmla_convert.loading.export import EXPORT_LAYOUTS, export
from vmla_convert.loading.load import load, open_named
from vmla_convert.loading.publish import push
from vmla_convert.loading.remote_code import SHIMS
from vmla_convert.loading.teacher import as_teacher
from vmla_convert.media.clips import open_clips
from vmla_convert.media.components import find_components
from vmla_convert.recovery.recover import recover

pytest_plugins = ["checkpoints", "hub_stub", "tiny_wan"]

# huggingface-hub 2.4 uploads in a way that its HTTP library calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "user/tiny-vmla"
CHEAP = ConvertConfig("mla", init="spectral", size=Sizes(cut=0.5))


@pytest.fixture(scope="module")
def old(converted: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A conversion by layout; in several shards, where a layout has them."""
    place = tmp_path_factory.mktemp("old")
    with pytest.MonkeyPatch.context() as patch:
        writer = partial(CheckpointWriter, one_file_bytes=50_000)
        patch.setattr("vmla_convert.loading.export.CheckpointWriter", writer)
        return {layout: export(converted, place / layout, layout) for layout in EXPORT_LAYOUTS}


@pytest.fixture(scope="module")
def sharded(old: dict[str, Path]) -> Path:
    assert len(list(old["native"].glob("*.safetensors"))) > 1
    return old["native"]


@pytest.fixture(scope="module")
def new(budgeted: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Another conversion by layout, in one file."""
    place = tmp_path_factory.mktemp("new")
    return {layout: export(budgeted, place / layout, layout) for layout in EXPORT_LAYOUTS}


@pytest.fixture
def copied(converted: Path, tmp_path: Path) -> Path:
    """A conversion to change."""
    return shutil.copytree(converted, tmp_path / "out")


@pytest.fixture(scope="module")
def pipeline(wan_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversion in diffusers' layout, with text encoder, tokenizer and VAE."""
    folder = tmp_path_factory.mktemp("pipeline") / "pipe"
    convert(SourceConfig(str(wan_folder), overrides=SETTINGS), folder, CHEAP, layout="diffusers")
    return folder


def folder_of(exported: Path) -> Path:
    """The folder to push; for one layout, `export` returns a file in it."""
    return exported if exported.is_dir() else exported.parent


def files_in(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def content(stub: Hub, name: str) -> bytes:
    return stub.repos[REPO].files[name].content


def output(model: CausalWanModel) -> torch.Tensor:
    latents, context = tiny_clip(MODEL, 4, batch=1)
    return model(latents, chunk_timesteps(MODEL, 4, batch=1), context, torch.arange(4))


def test_a_push_is_loaded_by_its_id(
    sharded: Path, stub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed = push(sharded, REPO, tag="v1")
    assert set(pushed.uploaded) == files_in(sharded)
    assert stub.repos[REPO].tags == {"v1": pushed.commit}
    here = output(load(sharded))
    for name in (REPO, f"{REPO}@v1", f"{REPO}@{pushed.commit}"):
        assert torch.equal(output(load(name)), here)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(output(load(f"{REPO}@v1")), here)


def test_only_changed_files_are_uploaded(sharded: Path, tmp_path: Path, stub: Hub) -> None:
    first = push(sharded, REPO)
    stub.asked.clear()
    stub.received.clear()
    again = push(sharded, REPO, tag="v1")
    assert (again.commit, again.uploaded, again.kept) == (first.commit, {}, first.uploaded)
    assert stub.calls("POST") == stub.calls("POST", "*/tag/*") == 1
    assert stub.received == []
    folder = shutil.copytree(sharded, tmp_path / "out")
    shard = min(folder.glob("*.safetensors"))
    save_file({k: v + 1 for k, v in load_file(shard).items()}, shard, {"format": "pt"})
    with pytest.raises(CheckpointError, match=shard.name):
        push(folder, REPO)
    seal(folder)
    assert set(push(folder, REPO).uploaded) == {shard.name, "conversion.json"}
    assert len(set(stub.received)) == 1
    assert torch.equal(output(load(REPO)), output(load(folder)))


@pytest.mark.parametrize(("before", "after"), [*product(EXPORT_LAYOUTS, EXPORT_LAYOUTS)])
def test_weights_of_an_earlier_conversion_in_any_layout_are_removed(
    before: str, after: str, old: dict[str, Path], new: dict[str, Path], stub: Hub
) -> None:
    first = push(folder_of(old[before]), REPO)
    apart = {"vae/model.safetensors": Blob(b"another part", large=True)}
    stub.repos[REPO].commit(stub.repos[REPO].files | apart)
    pushed = push(folder_of(new[after]), REPO)
    # A scheduler is a component, which nothing reads without an index.
    kept = {name for name in first.uploaded if before == "diffusers" and "scheduler" in name}
    own = {*pushed.uploaded, *pushed.kept}
    assert stub.repos[REPO].files.keys() == own | kept | apart.keys()
    assert set(pushed.removed) == first.uploaded.keys() - own - kept
    here, there = load(new[after]), load(REPO)
    assert here.config == there.config
    state = there.state_dict()
    assert here.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in here.state_dict().items())
    assert push(folder_of(new[after]), REPO).commit == stub.repos[REPO].head


def test_components_outlive_a_push_in_another_layout(
    wan_folder: Path, pipeline: Path, tmp_path: Path, stub: Hub
) -> None:
    """The repository's components serve the native folder, which has none."""
    push(pipeline, REPO)
    convert(SourceConfig(str(wan_folder), overrides=SETTINGS), tmp_path / "native", CHEAP)
    pushed = push(tmp_path / "native", REPO)
    transformer = {name for name in files_in(pipeline) if name.startswith("transformer/")}
    assert set(pushed.removed) == {"model_index.json", *SHIMS, *transformer}
    opened = open_named(REPO)
    base = find_components(opened.config, checkpoint=opened.source.path).base
    assert base == f"{REPO}@{stub.repos[REPO].head}"


def test_a_push_continues_after_a_broken_connection(sharded: Path, stub: Hub, vmla: Vmla) -> None:
    first, *others = [fingerprint(path) for path in sorted(sharded.glob("*.safetensors"))]
    stub.cut = f"/store/{first}"
    ran = vmla("push", sharded, REPO)
    assert refused(ran)
    assert "run it again" in ran.err
    assert stub.repos[REPO].files == {}
    assert set(stub.large) == set(others)
    stub.cut = None
    stub.received.clear()
    ran = vmla("push", sharded, REPO, "--json")
    assert ran.code == 0
    assert stub.repos[REPO].head == json.loads(ran.out)["commit"]
    assert set(stub.received) == {first}, "complete files are not sent again"
    assert torch.equal(output(load(REPO)), output(load(sharded)))


def test_other_files_in_the_folder_stay_here(converted: Path, copied: Path, stub: Hub) -> None:
    for name in (".env", "notes.txt", "out.state/settings.json"):
        (copied / name).parent.mkdir(exist_ok=True)
        (copied / name).write_text("{}")
    (copied / "strip.png").write_bytes(b"a picture")
    pushed = push(copied, REPO)
    own = files_in(converted) | {"strip.png"}
    assert set(pushed.uploaded) == stub.repos[REPO].files.keys() == own
    assert b"(strip.png)" in content(stub, "README.md")


def test_a_dry_run_changes_nothing(converted: Path, stub: Hub, vmla: Vmla) -> None:
    ran = vmla("push", converted, REPO, "--dry-run", "--json")
    shown = json.loads(ran.out)
    assert (ran.code, shown["commit"], stub.repos) == (0, None, {})
    nbytes = (converted / "model.safetensors").stat().st_size
    assert shown["uploaded"]["model.safetensors"] == nbytes
    push(converted, REPO)
    stub.asked.clear()
    assert vmla("push", converted, REPO, "--dry-run").code == 0
    assert {method for method, _ in stub.asked} == {"GET"}


def test_the_terminal_says_where_the_push_is(converted: Path, stub: Hub, vmla: Vmla) -> None:
    ran = vmla("push", converted, REPO, "--private", "--tag", "v1", "--message", "First")
    assert ran.code == 0
    for fact in (f"{stub.url}/{REPO}", stub.repos[REPO].head, "model.safetensors"):
        assert fact in ran.out
    assert f"vmla generate {REPO}" in ran.err
    assert stub.repos[REPO].private


# Card and records


def test_the_card_names_its_repository(copied: Path, stub: Hub) -> None:
    push(copied, REPO)
    text = content(stub, "README.md").decode()
    assert f'vmla.load("{REPO}")' in text
    assert 'vmla generate "."' not in text
    assert ModelCard(text).data.to_dict()["pipeline_tag"] == "text-to-video"
    assert 'vmla generate "."' in (copied / "README.md").read_text(), "the folder is not changed"
    with (copied / "README.md").open("a") as card:
        card.write("My own words.\n")
    push(copied, REPO)
    assert content(stub, "README.md") == (copied / "README.md").read_bytes()
    (copied / "README.md").write_bytes(b"# caf\xe9\n")
    with pytest.raises(CheckpointError, match=r"README\.md"):
        push(copied, REPO)


def test_local_folders_are_not_uploaded(copied: Path, stub: Hub) -> None:
    record = json.loads((copied / "conversion.json").read_text())
    record["source"]["asked"]["loras"] = ["/home/me/lora.pt:0.5"]
    record["convert"]["data"]["source"] = "/home/me/latents.safetensors"
    (copied / "conversion.json").write_text(json.dumps(record))
    push(copied, REPO)
    assert not any(b"/home/me" in blob.content for blob in stub.repos[REPO].files.values())
    there = json.loads(content(stub, "conversion.json"))
    assert there["source"]["asked"]["loras"] == ["lora.pt:0.5"]
    assert there["convert"]["data"]["source"] == "latents.safetensors"
    assert there["source"]["sha256"] == record["source"]["sha256"]
    assert push(copied, REPO).uploaded == {}


def test_no_folder_of_a_conversions_options_is_uploaded(
    teacher: Path, tmp_path: Path, stub: Hub, vmla: Vmla, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "secret-project"
    shutil.copytree(teacher, secret / "models" / "dense")
    save_file(
        {"latents": torch.randn(4, 6, 12, 12, 12), "context": torch.randn(4, 1, 10)},
        secret / "clips.safetensors",
    )
    save_file({"blocks.0.self_attn.q.diff": torch.zeros(48, 48)}, secret / "lora.safetensors")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    there = "../secret-project"
    ran = vmla(
        *("convert", f"{there}/models", "--file", "dense/model.pt", "-o", "out"),
        *("--lora", f"{there}/lora.safetensors:0.5", "--data", f"{there}/clips.safetensors"),
        *(
            "--set",
            f"model.base_model={there}/models",
            "--set",
            "convert.calibration_clips=2",
            "--set",
            "convert.data.frames=6",
        ),
    )
    assert ran.code == 0, ran.err
    push(Path("out"), REPO)
    assert not any(b"secret-project" in blob.content for blob in stub.repos[REPO].files.values())
    asked = json.loads(content(stub, "conversion.json"))["source"]["asked"]
    assert asked == {
        "file": "model.pt",
        "loras": ["lora.safetensors:0.5"],
        "overrides": {"base_model": "models"},
    }
    base, lora = f"{there}/models/dense/model.pt", f"{there}/lora.safetensors:0.5"
    here = SourceConfig(REPO, base_model=base, loras=(lora,))
    assert torch.equal(output(load(here)), output(load("out")))


@pytest.mark.slow
@pytest.mark.usefixtures("few_layerwise_clips")
def test_a_folder_of_clips_stays_private_from_any_working_folder(
    teacher: Path, tmp_path: Path, stub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret-project").mkdir()
    latents, context = open_clips(CLIPS).batch(0, 6)
    save_file({"latents": latents, "context": context}, tmp_path / "secret-project" / "clips")
    monkeypatch.chdir(tmp_path)
    data = replace(CLIPS, source="secret-project/clips")  # looks like a Hub id
    convert(teacher, Path("out"), replace(CONVERT, data=data))
    recover("out", teacher, Path("recovered"), replace(RECOVER, data=data), EVALUATE)
    monkeypatch.chdir("/")
    push(tmp_path / "recovered", REPO)
    assert not any(b"secret-project" in blob.content for blob in stub.repos[REPO].files.values())
    record = json.loads(content(stub, "conversion.json"))
    assert record["convert"]["data"]["source"] == record["recover"]["data"]["source"] == "clips"


def test_a_source_repository_stays_in_the_record(teacher: Path, tmp_path: Path, stub: Hub) -> None:
    """A published record finds the dense model again, like the local one."""
    files = {f"checkpoints/{file.name}": file.read_bytes() for file in teacher.iterdir()}
    stub.put("someone/dense", {**files, "checkpoints/other.pt": b"another"})
    source = SourceConfig("someone/dense@main", file="checkpoints/model.pt")
    convert(source, tmp_path / "out", CHEAP)
    push(tmp_path / "out", REPO)
    there = json.loads(content(stub, "conversion.json"))
    assert there == json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert there["source"]["asked"]["checkpoint"] == "someone/dense@main"
    for converted in (REPO, str(tmp_path / "out")):
        assert as_teacher("someone/dense", converted).file == source.file


# Refusals


@pytest.mark.parametrize("token", ["hf_nobody_knows_this_one", READ_TOKEN, ""])
def test_a_token_without_write_access_is_refused(
    token: str, converted: Path, stub: Hub, vmla: Vmla, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    ran = vmla("push", converted, REPO)
    assert refused(ran)
    assert "hf auth login" in ran.err.splitlines()[-1]
    assert stub.repos == {}
    assert not token or token not in ran.err


@pytest.mark.parametrize(
    ("refusal", "fact"),
    [
        (Refusal("POST", "*/commit/*", 409), "changed by somebody else"),
        (Refusal("POST", "*/commit/*", 412), "changed by somebody else"),
        (Refusal("POST", "*/commit/*", 403), REPO),
        (Refusal("POST", "*/commit/*", 400, "too many files"), "too many files"),
        (Refusal("POST", "*/commit/*", 400, f"bad header: {TOKEN}"), "(your token)"),
        (Refusal("POST", "*/objects/batch", 500), "error 500"),
        (Refusal("GET", "/api/models/*", 503), "error 503"),
    ],
)
def test_a_refusal_of_the_hub_is_one_sentence(
    refusal: Refusal, fact: str, converted: Path, stub: Hub, vmla: Vmla
) -> None:
    stub.refusals.append(refusal)
    ran = vmla("push", converted, REPO)
    assert refused(ran)
    assert fact in ran.err
    assert TOKEN not in ran.err


def test_a_hub_that_is_away_is_reported(
    converted: Path, stub: Hub, vmla: Vmla, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert refused(vmla("push", converted, REPO))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    ran = vmla("push", converted, REPO)
    assert refused(ran)
    assert "HF_HUB_OFFLINE" in ran.err
    assert stub.asked == []


def test_a_push_between_comparison_and_upload_is_a_conflict(
    sharded: Path, converted: Path, stub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(sharded, REPO)
    compare = publish.compare

    def late(repo: str, folder: Path) -> object:
        found = compare(repo, folder)
        stub.repos[repo].commit({**stub.repos[repo].files})
        return found

    monkeypatch.setattr(publish, "compare", late)
    with pytest.raises(OutputError, match="changed by somebody else"):
        push(converted, REPO)


def test_a_repository_in_another_state_is_not_changed(
    sharded: Path, converted: Path, stub: Hub
) -> None:
    stub.put("user/dense", {"model.pt": b"a dense model"})
    with pytest.raises(OutputError, match=r"model\.pt"):
        push(converted, "user/dense")
    first = push(sharded, REPO, tag="v1")
    with pytest.raises(OutputError, match="public"):
        push(converted, REPO, private=True)
    assert push(sharded, REPO, tag="v1").commit == first.commit
    with pytest.raises(OutputError, match="tag v1"):
        push(converted, REPO, tag="v1")
    assert stub.repos[REPO].head == first.commit


def without_record(folder: Path) -> None:
    (folder / "conversion.json").unlink()


def without_a_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop("head.head.weight")
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize("damage", [without_record, without_a_tensor, shutil.rmtree])
def test_a_folder_that_is_no_whole_conversion_is_refused(
    damage: Callable[[Path], None], copied: Path, stub: Hub
) -> None:
    damage(copied)
    with pytest.raises(CheckpointError):
        push(copied, REPO)
    assert stub.asked == []


def test_a_dense_checkpoint_is_refused(teacher: Path, stub: Hub) -> None:
    with pytest.raises(CheckpointError, match="not a converted checkpoint"):
        push(teacher, REPO)
    assert stub.asked == []


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        *((name, None) for name in ("tiny", "user/tiny@v1", "a/b/c", "./here/there")),
        *((REPO, tag) for tag in ("", "v 1", "../x", "a/b")),
    ],
)
def test_a_bad_name_of_a_repository_or_tag_is_refused_first(
    name: str, tag: str | None, converted: Path, stub: Hub
) -> None:
    with pytest.raises(ConfigError):
        push(converted, name, tag=tag)
    assert stub.asked == []


@pytest.mark.usefixtures("stub")
def test_a_private_conversion_needs_a_token(
    converted: Path, vmla: Vmla, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(converted, REPO, private=True)
    for token in ("", "hf_nobody_knows_this_one"):
        monkeypatch.setenv("HF_TOKEN", token)
        ran = vmla("inspect", REPO)
        assert refused(ran)
        assert REPO in ran.err
        assert "hf auth login" in ran.err
        assert not token or token not in ran.err
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    assert torch.equal(output(load(REPO)), output(load(converted)))


# Pipelines


def test_a_pipeline_is_uploaded_with_its_components_only(
    pipeline: Path, tmp_path: Path, stub: Hub
) -> None:
    folder = shutil.copytree(pipeline, tmp_path / "mine" / "pipe")
    own = files_in(folder)
    assert {"model_index.json", "vae/config.json", "tokenizer/tokenizer_config.json"} <= own
    older = {  # pickled weights, shards, and a tokenizer of sentencepiece
        *("vae/diffusion_pytorch_model.bin", "text_encoder/model-00001-of-00002.safetensors"),
        *("text_encoder/model.safetensors.index.json", "tokenizer/spiece.model"),
        "tokenizer/merges.txt",
    }
    for name in older:
        (folder / name).write_text("{}")
    for part in ("vae", "text_encoder", "tokenizer", "scheduler", "transformer", "notes", ".."):
        for name in (".env", ".secret.json", "run.sh", "notes.md", ".cache/token.json"):
            (folder / part / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / part / name).write_text("{}")
    (folder / "transformer" / "notes.json").write_text("{}")
    (folder / "vae" / "prompts.txt").write_text("mine")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {name: ["some", "Class"] for name in ("notes", "..", str(tmp_path), "missing")}
    (folder / "model_index.json").write_text(json.dumps(index))
    pushed = push(folder, REPO)
    assert set(pushed.uploaded) == stub.repos[REPO].files.keys() == own | older | {*SHIMS}
    here, there = load(pipeline).state_dict(), load(REPO).state_dict()
    assert all(torch.equal(tensor, there[name]) for name, tensor in here.items())
    again = push(folder, REPO)
    assert (again.uploaded, again.removed) == ({}, ())


@pytest.mark.parametrize("index", ["[]", "{", "\xe9"])
def test_a_damaged_index_of_a_pipeline_is_named(
    index: str, new: dict[str, Path], tmp_path: Path, stub: Hub
) -> None:
    folder = shutil.copytree(new["diffusers"], tmp_path / "pipe")
    (folder / "model_index.json").write_bytes(index.encode("latin-1"))
    with pytest.raises(CheckpointError, match=re.escape(str(folder / "model_index.json"))):
        push(folder, REPO)
    assert stub.asked == []


def test_the_origin_of_a_component_is_not_uploaded(
    pipeline: Path, tmp_path: Path, stub: Hub
) -> None:
    folder = shutil.copytree(pipeline, tmp_path / "pipe")
    origins = {
        "vae/config.json": ("_name_or_path", "/home/me/secret-project/vae", "vae"),
        "text_encoder/config.json": ("_name_or_path", "Wan-AI/Wan2.1-T2V", "Wan-AI/Wan2.1-T2V"),
        "tokenizer/tokenizer_config.json": ("name_or_path", "../secret-project/words", "words"),
    }
    for name, (key, origin, _) in origins.items():
        table = json.loads((folder / name).read_text()) | {key: origin, "odd": "/not/a folder"}
        (folder / name).write_text(json.dumps(table))
    push(folder, REPO)
    assert not any(b"secret-project" in blob.content for blob in stub.repos[REPO].files.values())
    for name, (key, _, public) in origins.items():
        table = json.loads((folder / name).read_text())
        assert json.loads(content(stub, name)) == table | {key: public}
    assert push(folder, REPO).uploaded == {}


def test_the_programs_in_a_pipelines_card_run(
    pipeline: Path, tmp_path: Path, stub: Hub, vmla: Vmla, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All commands run on shorter clips, with the repository's own text encoder and VAE."""
    push(pipeline, REPO)
    card = content(stub, "README.md").decode()
    assert 'VMLAPipeline.from_pretrained(".")' in (pipeline / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    shell, *programs = re.findall(r"```(?:sh|python)\n(.*?)```", card, re.DOTALL)
    command = shlex.split(shell.splitlines()[1])
    assert vmla(*command[1:], "--frames", "2").code == 0
    assert (tmp_path / "clip.mp4").is_file()
    assert len(programs) == 2
    for program in programs:
        short = program.replace("frames=240", "frames=2").replace("num_frames=81", "num_frames=5")
        assert short != program
        exec(short, {})
    assert (tmp_path / "clip.gif").is_file()

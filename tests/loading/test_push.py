"""Push to a Hub on the loopback, and load from there by id."""

from __future__ import annotations

import json
import re
import shlex
import shutil
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

from vmla_convert.checkpoint.source import fingerprint
from vmla_convert.checkpoint.writer import CheckpointWriter, write_checkpoint
from vmla_convert.config import ConvertConfig, SourceConfig
from vmla_convert.errors import CheckpointError, ConfigError, VmlaError
from vmla_convert.fitting.convert import convert
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.loading.export import LAYOUTS, export
from vmla_convert.loading.load import as_teacher, load, open_named
from vmla_convert.loading.publish import push
from vmla_convert.media.components import find_components
from vmla_convert.recovery.recover import recover

pytest_plugins = ["checkpoints", "hub_stub", "tiny_wan"]

# That huggingface-hub 2.4 uploads in a way that its HTTP library calls old is not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "user/tiny-vmla"


@pytest.fixture(scope="module")
def sharded(converted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The conversion in several files, as a large one is."""
    folder = tmp_path_factory.mktemp("sharded") / "out"
    texts = {
        name: (converted / name).read_text()
        for name in ("config.json", "conversion.json", "README.md")
    }
    write_checkpoint(folder, load_file(converted / "model.safetensors"), texts, 50_000)
    return folder


@pytest.fixture(scope="module")
def old(converted: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A conversion by layout; in several files, where a layout has them."""
    place = tmp_path_factory.mktemp("old")
    with pytest.MonkeyPatch.context() as patch:
        writer = partial(CheckpointWriter, one_file_bytes=50_000)
        patch.setattr("vmla_convert.loading.export.CheckpointWriter", writer)
        folders = {layout: export(converted, place / layout, layout) for layout in LAYOUTS}
    for layout in ("native", "diffusers"):
        assert len(list(folders[layout].rglob("*.safetensors"))) > 1
    return folders


@pytest.fixture(scope="module")
def new(budgeted: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Another one, in one file."""
    place = tmp_path_factory.mktemp("new")
    return {layout: export(budgeted, place / layout, layout) for layout in LAYOUTS}


def folder_of(exported: Path) -> Path:
    """The folder to push: of one layout, `export` names a file in it."""
    return exported if exported.is_dir() else exported.parent


def says(model: CausalWanModel) -> torch.Tensor:
    latents, context = tiny_clip(MODEL, 4, batch=1)
    return model(latents, chunk_timesteps(MODEL, 4, batch=1), context, torch.arange(4))


def test_what_was_pushed_is_loaded_by_its_id(
    sharded: Path, stub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed = push(sharded, REPO, tag="v1")
    shards = [name for name in pushed.uploaded if name.endswith(".safetensors")]
    assert len(shards) > 1
    assert set(pushed.uploaded) == {path.name for path in sharded.iterdir()}
    assert stub.repos[REPO].tags == {"v1": pushed.commit}
    here = says(load(sharded))
    for name in (REPO, f"{REPO}@v1", f"{REPO}@{pushed.commit}"):
        assert torch.equal(says(load(name)), here)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(says(load(REPO)), here)
    assert torch.equal(says(load(f"{REPO}@v1")), here)


def test_a_second_push_uploads_nothing(sharded: Path, stub: Hub) -> None:
    first = push(sharded, REPO)
    stub.asked.clear()
    stub.received.clear()
    again = push(sharded, REPO, tag="v1")
    assert again.commit == first.commit
    assert (again.uploaded, again.kept) == ({}, first.uploaded)
    assert {method for method, _ in stub.asked} == {"GET", "POST"}
    assert stub.calls("POST") == stub.calls("POST", "*/tag/*") == 1
    assert stub.received == []


def test_only_what_changed_goes_up(sharded: Path, tmp_path: Path, stub: Hub) -> None:
    push(sharded, REPO)
    folder = shutil.copytree(sharded, tmp_path / "out")
    shard = next(iter(sorted(folder.glob("*.safetensors"))))
    save_file({k: v + 1 for k, v in load_file(shard).items()}, shard, {"format": "pt"})
    stub.received.clear()
    pushed = push(folder, REPO)
    assert list(pushed.uploaded) == [shard.name]
    assert len(set(stub.received)) == 1
    assert torch.equal(says(load(REPO)), says(load(folder)))


def test_weights_of_an_earlier_conversion_go(sharded: Path, converted: Path, stub: Hub) -> None:
    """They would be found beside the new ones, and taken for them."""
    push(sharded, REPO)
    apart = {"vae/model.safetensors": Blob(b"another part", large=True)}
    stub.repos[REPO].commit(stub.repos[REPO].files | apart)
    pushed = push(converted, REPO)
    gone = {path.name for path in sharded.iterdir()} - {path.name for path in converted.iterdir()}
    assert set(pushed.removed) == gone
    assert {"model.safetensors", *apart} <= stub.repos[REPO].files.keys()
    assert not gone & stub.repos[REPO].files.keys()
    assert torch.equal(says(load(REPO)), says(load(converted)))


@pytest.mark.parametrize(("before", "after"), [*product(LAYOUTS, LAYOUTS)])
def test_in_whatever_layout_the_id_means_what_was_pushed_last(
    before: str, after: str, old: dict[str, Path], new: dict[str, Path], stub: Hub
) -> None:
    first = push(folder_of(old[before]), REPO)
    pushed = push(folder_of(new[after]), REPO)
    # A scheduler is a component, which nothing reads without an index.
    kept = {name for name in first.uploaded if before == "diffusers" and "scheduler" in name}
    own = {*pushed.uploaded, *pushed.kept}
    assert stub.repos[REPO].files.keys() == own | kept
    assert set(pushed.removed) == first.uploaded.keys() - own - kept
    here, there = load(new[after]), load(REPO)
    assert here.config == there.config
    assert here.state_dict().keys() == there.state_dict().keys()
    for name, tensor in here.state_dict().items():
        assert torch.equal(there.state_dict()[name], tensor)
    stub.received.clear()
    again = push(folder_of(new[after]), REPO)
    assert (again.uploaded, again.removed, again.commit) == ({}, (), pushed.commit)
    assert stub.received == []


def test_components_outlive_a_push_in_another_layout(
    wan_folder: Path, tmp_path: Path, stub: Hub
) -> None:
    """And are the repository's still; a native folder cannot bring its own."""
    source = SourceConfig(str(wan_folder), overrides=SETTINGS)
    for layout in ("diffusers", "native"):
        how = ConvertConfig("mla", init="spectral", cut=0.5)
        convert(source, tmp_path / layout, how, layout=layout)
        pushed = push(tmp_path / layout, REPO)
    assert set(pushed.removed) == {
        "model_index.json",
        "transformer/config.json",
        "transformer/conversion.json",
        "transformer/diffusion_pytorch_model.safetensors",
    }
    opened = open_named(REPO)
    base = find_components(opened.config, checkpoint=opened.source.path).base
    assert base == f"{REPO}@{stub.repos[REPO].head}"


def test_a_cut_line_is_told_and_the_next_push_goes_on(sharded: Path, stub: Hub, vmla: Vmla) -> None:
    first, *others = [fingerprint(path) for path in sorted(sharded.glob("*.safetensors"))]
    stub.cut = f"/store/{first}/2"
    ran = vmla("push", sharded, REPO)
    assert refused(ran)
    assert "broke off" in ran.err
    assert "run it again: what is there is kept" in ran.err
    assert stub.repos[REPO].files == {}
    assert set(stub.large) == set(others)
    stub.cut = None
    stub.received.clear()
    ran = vmla("push", sharded, REPO, "--json")
    assert ran.code == 0
    told = json.loads(ran.out)
    assert stub.repos[REPO].head == told["commit"]
    assert set(stub.received) == {first}, "what had arrived whole is not sent again"
    assert torch.equal(says(load(REPO)), says(load(sharded)))


def test_nothing_else_in_the_folder_goes_up(converted: Path, tmp_path: Path, stub: Hub) -> None:
    folder = shutil.copytree(converted, tmp_path / "out")
    (folder / ".env").write_text("secret")
    (folder / "out.state").mkdir()
    (folder / "out.state" / "settings.json").write_text("{}")
    (folder / "notes.txt").write_text("mine")
    (folder / "strip.png").write_bytes(b"a picture")
    pushed = push(folder, REPO)
    own = {path.name for path in converted.iterdir()}
    assert set(pushed.uploaded) == stub.repos[REPO].files.keys() == own | {"strip.png"}
    card = stub.repos[REPO].files["README.md"].content.decode()
    assert "![frames of a rollout](strip.png)" in card


def test_a_dry_run_changes_nothing(converted: Path, stub: Hub, vmla: Vmla) -> None:
    ran = vmla("push", converted, REPO, "--dry-run", "--json")
    told = json.loads(ran.out)
    assert ran.code == 0
    assert told["commit"] is None
    assert told["uploaded"]["model.safetensors"] == (converted / "model.safetensors").stat().st_size
    assert stub.repos == {}
    assert {method for method, _ in stub.asked} == {"GET"}
    push(converted, REPO)
    stub.asked.clear()
    ran = vmla("push", converted, REPO, "--dry-run")
    assert "would stay as it is" in ran.out
    assert {method for method, _ in stub.asked} == {"GET"}


def test_the_terminal_tells_where_it_is(converted: Path, stub: Hub, vmla: Vmla) -> None:
    ran = vmla("push", converted, REPO, "--private", "--tag", "v1", "--message", "First")
    assert ran.code == 0
    assert f"{stub.url}/{REPO} (private)" in ran.out
    assert stub.repos[REPO].head in ran.out
    assert "model.safetensors" in ran.out
    assert f"vmla generate {REPO}" in ran.err
    assert stub.repos[REPO].private


def test_the_card_that_is_pushed_names_its_repository(converted: Path, stub: Hub) -> None:
    push(converted, REPO)
    text = stub.repos[REPO].files["README.md"].content.decode()
    assert f'vmla.load("{REPO}")' in text
    assert 'vmla generate "."' not in text
    assert ModelCard(text).data.to_dict()["pipeline_tag"] == "text-to-video"
    assert 'vmla generate "."' in (converted / "README.md").read_text(), "the folder stays as it is"


def test_folders_of_this_machine_stay_here(converted: Path, tmp_path: Path, stub: Hub) -> None:
    folder = shutil.copytree(converted, tmp_path / "out")
    record = json.loads((folder / "conversion.json").read_text())
    record["source"]["asked"]["loras"] = ["/home/me/lora.pt:0.5"]
    record["convert"]["data"]["source"] = "/home/me/latents.safetensors"
    (folder / "conversion.json").write_text(json.dumps(record))
    push(folder, REPO)
    files = stub.repos[REPO].files
    assert not any(b"/home/me" in blob.content for blob in files.values())
    there = json.loads(files["conversion.json"].content)
    assert there["source"]["asked"]["loras"] == ["lora.pt:0.5"]
    assert there["convert"]["data"]["source"] == "latents.safetensors"
    assert there["source"]["sha256"] == record["source"]["sha256"]
    assert push(folder, REPO).uploaded == {}


def test_no_folder_that_a_conversion_was_given_goes_up(
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
        *("--set", f"base_model={there}/models", "--calibration-clips", "2", "--frames", "6"),
    )
    assert ran.code == 0, ran.err
    push(Path("out"), REPO)
    files = stub.repos[REPO].files
    assert not any(b"secret-project" in blob.content for blob in files.values())
    asked = json.loads(files["conversion.json"].content)["source"]["asked"]
    assert asked == {
        "file": "model.pt",
        "loras": ["lora.safetensors:0.5"],
        "overrides": ["base_model=models"],
    }
    base, lora = f"{there}/models/dense/model.pt", f"{there}/lora.safetensors:0.5"
    here = SourceConfig(REPO, base_model=base, loras=(lora,))
    assert torch.equal(says(load(here)), says(load("out")))


@pytest.mark.usefixtures("few_layerwise_clips")
def test_a_base_that_was_a_folder_is_known_for_one_from_anywhere(
    teacher: Path, tmp_path: Path, stub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret-project" / "pipe").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    data = replace(CLIPS, base="secret-project/pipe")  # an id of the Hub, by its looks
    convert(teacher, Path("out"), replace(CONVERT, data=data))
    recover("out", teacher, Path("recovered"), replace(RECOVER, data=data), EVALUATE)
    monkeypatch.chdir("/")
    push(tmp_path / "recovered", REPO)
    files = stub.repos[REPO].files
    assert not any(b"secret-project" in blob.content for blob in files.values())
    record = json.loads(files["conversion.json"].content)
    assert record["convert"]["data"]["base"] == record["recover"]["data"]["base"] == "pipe"


def test_what_was_a_repository_stays_one(teacher: Path, tmp_path: Path, stub: Hub) -> None:
    """A published record serves to read the dense model again, as its own does."""
    files = {f"checkpoints/{file.name}": file.read_bytes() for file in teacher.iterdir()}
    stub.put("someone/dense", {**files, "checkpoints/other.pt": b"another"})
    source = SourceConfig("someone/dense@main", file="checkpoints/model.pt")
    convert(source, tmp_path / "out", ConvertConfig("mla", init="spectral", cut=0.5))
    push(tmp_path / "out", REPO)
    there = json.loads(stub.repos[REPO].files["conversion.json"].content)
    assert there == json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert there["source"]["asked"]["checkpoint"] == "someone/dense@main"
    for converted in (REPO, str(tmp_path / "out")):
        assert as_teacher("someone/dense", converted).file == source.file


def test_a_card_of_the_users_own_goes_up_as_it_is(
    converted: Path, tmp_path: Path, stub: Hub
) -> None:
    folder = shutil.copytree(converted, tmp_path / "out")
    with (folder / "README.md").open("a") as card:
        card.write("My own words.\n")
    push(folder, REPO)
    content = stub.repos[REPO].files["README.md"].content
    assert content == (folder / "README.md").read_bytes()


@pytest.mark.parametrize(
    ("token", "message", "hint"),
    [
        ("hf_nobody_knows_this_one", "the Hub does not accept your token", "hf auth login"),
        (READ_TOKEN, f"your token may not write to {REPO}", "hf auth login"),
        ("", "nobody is logged in to the Hub here", "hf auth login"),
    ],
)
def test_a_token_that_does_not_do_is_told(
    token: str,
    message: str,
    hint: str,
    converted: Path,
    stub: Hub,
    vmla: Vmla,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    ran = vmla("push", converted, REPO)
    assert refused(ran)
    assert f"Error: {message}" in ran.err
    assert hint in ran.err.splitlines()[-1]
    assert stub.repos == {}
    assert not token or token not in ran.out + ran.err


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        (Refusal("POST", "*/commit/*", 409), "was changed by somebody else meanwhile"),
        (Refusal("POST", "*/commit/*", 412), "was changed by somebody else meanwhile"),
        (Refusal("POST", "*/commit/*", 403), "your token may not write to"),
        (Refusal("POST", "*/commit/*", 400, "too many files"), "error 400: too many files"),
        (Refusal("POST", "*/objects/batch", 500), "error 500"),
        (Refusal("GET", "/api/models/*", 503), "error 503"),
    ],
)
def test_a_refusal_is_one_sentence(
    refusal: Refusal, message: str, converted: Path, stub: Hub, vmla: Vmla
) -> None:
    stub.refusals.append(refusal)
    ran = vmla("push", converted, REPO)
    assert refused(ran)
    assert message in ran.err


def test_a_hub_that_is_away_is_told(
    converted: Path, stub: Hub, vmla: Vmla, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    ran = vmla("push", converted, REPO)
    assert refused(ran)
    assert "broke off" in ran.err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    ran = vmla("push", converted, REPO)
    assert refused(ran)
    assert "HF_HUB_OFFLINE is set" in ran.err
    assert stub.asked == []


def test_a_token_that_a_server_sends_back_is_struck_out(
    converted: Path, stub: Hub, vmla: Vmla
) -> None:
    stub.refusals.append(Refusal("POST", "*/commit/*", 400, f"bad header: Bearer {TOKEN}"))
    ran = vmla("push", converted, REPO)
    assert refused(ran)
    assert "(your token)" in ran.err
    assert TOKEN not in ran.err


def test_a_push_between_look_and_commit_is_a_conflict(
    sharded: Path, converted: Path, stub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(sharded, REPO)
    from vmla_convert.loading import publish

    def late(repo: str, files: dict[str, Path], *told: object) -> object:
        found = compare(repo, files, *told)  # pyright: ignore[reportArgumentType]
        stub.repos[repo].commit({**stub.repos[repo].files})
        return found

    compare = publish.compare
    monkeypatch.setattr(publish, "compare", late)
    with pytest.raises(VmlaError, match="changed by somebody else"):
        push(converted, REPO)


def test_other_peoples_weights_are_not_replaced(converted: Path, stub: Hub) -> None:
    stub.put(REPO, {"model.pt": b"a dense model"})
    with pytest.raises(VmlaError, match=r"holds weights that are no conversion: model\.pt"):
        push(converted, REPO)


def test_a_public_repository_does_not_pass_for_a_private_one(converted: Path, stub: Hub) -> None:
    push(converted, REPO)
    with pytest.raises(VmlaError, match="is there already, and public"):
        push(converted, REPO, private=True)
    assert not stub.repos[REPO].private


def test_a_tag_stays_where_it_is(sharded: Path, converted: Path, stub: Hub) -> None:
    first = push(sharded, REPO, tag="v1")
    assert push(sharded, REPO, tag="v1").commit == first.commit
    with pytest.raises(VmlaError, match="has a tag v1 already, of another state"):
        push(converted, REPO, tag="v1")
    assert stub.repos[REPO].head == first.commit


def test_what_is_no_conversion_is_not_pushed(
    converted: Path, teacher: Path, tmp_path: Path, stub: Hub, vmla: Vmla
) -> None:
    unrecorded = shutil.copytree(converted, tmp_path / "unrecorded")
    (unrecorded / "conversion.json").unlink()
    half = shutil.copytree(converted, tmp_path / "half")
    weights = load_file(half / "model.safetensors")
    weights.pop("head.head.weight")
    save_file(weights, half / "model.safetensors")
    for place in (teacher, unrecorded, half, tmp_path, tmp_path / "nothing"):
        ran = vmla("push", place, REPO)
        assert refused(ran), place
    assert stub.asked == []


@pytest.mark.parametrize("name", ["tiny", "user/tiny@v1", "a/b/c", "./here/there"])
def test_what_is_no_name_is_not_pushed_to(
    name: str, converted: Path, stub: Hub, vmla: Vmla
) -> None:
    ran = vmla("push", converted, name)
    assert refused(ran)
    assert "owner/name" in ran.err
    assert stub.asked == []


@pytest.mark.usefixtures("stub")
def test_a_private_conversion_is_for_those_who_may_see_it(
    converted: Path, vmla: Vmla, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(converted, REPO, private=True)
    for token, message in (
        ("", f"there is no repository {REPO} on the Hub, or it is private"),
        ("hf_nobody_knows_this_one", f"the Hub does not let you read {REPO}"),
    ):
        monkeypatch.setenv("HF_TOKEN", token)
        ran = vmla("inspect", REPO)
        assert refused(ran)
        assert message in ran.err
        assert "hf auth login" in ran.err
        assert not token or token not in ran.err
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    assert torch.equal(says(load(REPO)), says(load(converted)))


def test_a_revision_that_is_not_there_is_told(converted: Path, stub: Hub, vmla: Vmla) -> None:
    push(converted, REPO)
    ran = vmla("inspect", f"{REPO}@v9")
    assert refused(ran)
    assert f"{REPO} has no revision 'v9'" in ran.err
    assert stub.served == 0


def test_a_pipelines_folder_goes_up_whole(wan_folder: Path, tmp_path: Path, stub: Hub) -> None:
    folder = tmp_path / "pipe"
    source = SourceConfig(str(wan_folder), overrides=SETTINGS)
    convert(source, folder, ConvertConfig("mla", calibrate=False), layout="diffusers")
    pushed = push(folder, REPO)
    names = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    assert set(pushed.uploaded) == names <= set(stub.repos[REPO].files)
    assert {"model_index.json", "vae/config.json", "tokenizer/tokenizer_config.json"} <= names
    here, there = load(folder).state_dict(), load(REPO).state_dict()
    assert all(torch.equal(tensor, there[name]) for name, tensor in here.items())


def test_nothing_else_in_a_pipelines_folders_goes_up(
    wan_folder: Path, tmp_path: Path, stub: Hub
) -> None:
    folder = tmp_path / "mine" / "pipe"
    source = SourceConfig(str(wan_folder), overrides=SETTINGS)
    convert(source, folder, ConvertConfig("mla", init="spectral", cut=0.5), layout="diffusers")
    own = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    parts = ("vae", "text_encoder", "tokenizer", "scheduler", "transformer")
    for part in (*parts, "notes", ".."):
        for name in (".env", ".secret.json", "run.sh", "notes.md", ".cache/token.json"):
            (folder / part / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / part / name).write_text("{}")
    (folder / "transformer" / "notes.json").write_text("{}")
    (folder / "vae" / "prompts.txt").write_text("mine")
    (tmp_path / "mine" / "config.json").write_text("{}")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {name: ["some", "Class"] for name in ("notes", "..", str(tmp_path), "missing")}
    (folder / "model_index.json").write_text(json.dumps(index))
    pushed = push(folder, REPO)
    assert set(pushed.uploaded) == stub.repos[REPO].files.keys() == own


def test_what_a_component_of_older_form_needs_goes_up(
    wan_folder: Path, tmp_path: Path, stub: Hub
) -> None:
    """Pickled weights, several files of them, and a tokenizer by sentencepiece."""
    folder = tmp_path / "pipe"
    source = SourceConfig(str(wan_folder), overrides=SETTINGS)
    convert(source, folder, ConvertConfig("mla", init="spectral", cut=0.5), layout="diffusers")
    more = {
        "vae/diffusion_pytorch_model.bin",
        "text_encoder/model-00001-of-00002.safetensors",
        "text_encoder/model.safetensors.index.json",
        "tokenizer/special_tokens_map.json",
        "tokenizer/spiece.model",
        "tokenizer/merges.txt",
    }
    for name in more:
        (folder / name).write_text("{}")
    assert more < push(folder, REPO).uploaded.keys() == stub.repos[REPO].files.keys()
    assert push(folder, REPO).removed == ()


@pytest.mark.parametrize("index", ["[]", "null", "{", "\xe9"])
def test_a_damaged_index_of_a_pipeline_is_named(
    index: str, new: dict[str, Path], tmp_path: Path, stub: Hub, vmla: Vmla
) -> None:
    folder = shutil.copytree(new["diffusers"], tmp_path / "pipe")
    (folder / "model_index.json").write_bytes(index.encode("latin-1"))
    ran = vmla("push", folder, REPO)
    assert refused(ran)
    assert f"{folder / 'model_index.json'} is not" in ran.err
    assert stub.asked == []


def test_where_a_component_lay_does_not_go_up(wan_folder: Path, tmp_path: Path, stub: Hub) -> None:
    base = shutil.copytree(wan_folder, tmp_path / "base")
    origins = {
        "vae/config.json": ("_name_or_path", "/home/me/secret-project/vae", "vae"),
        "text_encoder/config.json": ("_name_or_path", "Wan-AI/Wan2.1-T2V", "Wan-AI/Wan2.1-T2V"),
        "tokenizer/tokenizer_config.json": ("name_or_path", "../secret-project/words", "words"),
    }
    for name, (key, origin, _) in origins.items():
        table = json.loads((base / name).read_text()) | {key: origin, "odd": "/not/a folder"}
        (base / name).write_text(json.dumps(table))
    source = SourceConfig(str(base), overrides=SETTINGS)
    convert(
        source,
        tmp_path / "pipe",
        ConvertConfig("mla", init="spectral", cut=0.5),
        layout="diffusers",
    )
    push(tmp_path / "pipe", REPO)
    files = stub.repos[REPO].files
    assert not any(b"secret-project" in blob.content for blob in files.values())
    for name, (key, _, public) in origins.items():
        table = json.loads((base / name).read_text())
        assert json.loads(files[name].content) == table | {key: public}
    assert push(tmp_path / "pipe", REPO).uploaded == {}


def test_a_pipelines_card_says_what_runs(
    wan_folder: Path, tmp_path: Path, stub: Hub, vmla: Vmla, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of its lines, on shorter clips, with the repository's own text encoder and VAE."""
    how = ConvertConfig("mla", init="spectral", cut=0.5)
    convert(
        SourceConfig(str(wan_folder), overrides=SETTINGS),
        tmp_path / "pipe",
        how,
        layout="diffusers",
    )
    push(tmp_path / "pipe", REPO)
    card = stub.repos[REPO].files["README.md"].content.decode()
    assert f'VMLAPipeline.from_pretrained("{REPO}")' in card
    own = (tmp_path / "pipe" / "README.md").read_text()
    assert 'VMLAPipeline.from_pretrained(".")' in own
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


@pytest.mark.parametrize("tag", ["", "v 1", "../x", "a/b"])
def test_a_name_that_no_tag_can_have_is_refused_first(sharded: Path, stub: Hub, tag: str) -> None:
    with pytest.raises(ConfigError, match="tag"):
        push(sharded, REPO, tag=tag)
    assert not stub.asked


def test_a_page_in_another_encoding_is_named(sharded: Path, stub: Hub, tmp_path: Path) -> None:
    folder = shutil.copytree(sharded, tmp_path / "out")
    (folder / "README.md").write_bytes(b"# caf\xe9\n")
    with pytest.raises(CheckpointError, match=r"README\.md is not in UTF-8"):
        push(folder, REPO)
    assert not stub.repos

"""Files and models named by `--file`, `--key` and `--model`, in commands that run a model."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import EVALUATE, MODEL, Ran, Vmla, refused
from conftest import tiny_model
from hub_stub import Hub

from vmla_convert.checkpoint.known import KNOWN, KnownModel
from vmla_convert.loading.load import is_conversion
from vmla_convert.training.pretrain import save_self_forcing

pytest_plugins = ["checkpoints", "hub_stub"]

TWO, MINE = "user/two", "user/mine"
FILM = ("--prompt", "7", "--frames", "4", "-o")
CHEAP = (
    "--steps",
    "1",
    "--set",
    "recover.layerwise_steps=0",
    "--batch-size",
    "1",
    "--set",
    "recover.data.frames=6",
)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another dense checkpoint of the same sizes."""
    folder = tmp_path_factory.mktemp("other") / "checkpoint"
    save_self_forcing(tiny_model(MODEL, seed=1).state_dict(), MODEL, folder)
    return folder


@pytest.fixture
def two(teacher: Path, other: Path, stub: Hub) -> Hub:
    """A repository of two dense checkpoints, and one of a conversion to come."""
    stub.put(
        TWO,
        {
            f"{name}/{file.name}": file.read_bytes()
            for name, folder in (("one", other), ("two", teacher))
            for file in folder.iterdir()
        },
    )
    return stub


def put(hub: Hub, folder: Path, inside: str = "") -> None:
    hub.put(MINE, {f"{inside}{file.name}": file.read_bytes() for file in folder.iterdir()})


def hinted(ran: Ran) -> list[str]:
    """The words that an error says to add."""
    assert refused(ran), ran.err
    hint = " ".join(ran.err.partition("hint: ")[2].split())
    assert hint.startswith("add --file ")
    return shlex.split(hint.removeprefix("add ").partition(",")[0])


@pytest.mark.usefixtures("two")
def test_generate_takes_what_its_hint_says(
    teacher: Path, other: Path, tmp_path: Path, vmla: Vmla
) -> None:
    words = hinted(vmla("generate", TWO, *FILM, tmp_path / "a.mp4"))
    assert words == ["--file", "one/model.pt"]
    for name, how in (("one", words), ("two", ["--file", "two"])):
        ran = vmla("generate", TWO, *how, *FILM, tmp_path / f"{name}.mp4")
        assert ran.code == 0, ran.err
    for name, folder in (("one", other), ("two", teacher)):
        assert vmla("generate", folder, *FILM, tmp_path / f"{name}-here.mp4").code == 0
        here, there = (tmp_path / f"{name}{end}.mp4" for end in ("-here", ""))
        assert here.read_bytes() == there.read_bytes()
    assert (tmp_path / "one.mp4").read_bytes() != (tmp_path / "two.mp4").read_bytes()


@pytest.mark.parametrize("dense_first", [True, False])
@pytest.mark.parametrize("place", ["here", "", "transformer/"])
def test_of_two_that_are_compared_the_file_is_of_the_dense_one(
    dense_first: bool,
    place: str,
    converted: Path,
    teacher: Path,
    two: Hub,
    tmp_path: Path,
    vmla: Vmla,
) -> None:
    if place != "here":
        put(two, converted, place)
    mine = converted if place == "here" else MINE

    def film(name: str, dense: str | Path, *how: str) -> bytes:
        first, second = (dense, mine) if dense_first else (mine, dense)
        video = tmp_path / f"{name}.mp4"
        ran = vmla("generate", first, "--compare", second, *how, *FILM, video)
        assert ran.code == 0, ran.err
        return video.read_bytes()

    assert film("there", TWO, "--file", "two") == film("local", teacher)


def test_only_a_conversion_is_known_for_one(
    converted: Path, teacher: Path, two: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(two, converted)
    assert all(map(is_conversion, (str(converted), str(converted / "model.safetensors"), MINE)))
    # "demo" is no file here, whatever lies beside it would.
    monkeypatch.chdir(converted)
    shutil.copytree(teacher, tmp_path / "several")
    shutil.copy(teacher / "model.pt", tmp_path / "several" / "more.pt")
    dense = (str(teacher), str(tmp_path / "several"), str(tmp_path / "nothing"), TWO, "demo")
    assert not any(map(is_conversion, dense))
    assert two.served == 0


def test_generate_reads_the_state_dict_and_the_model_that_are_named(
    teacher: Path, other: Path, tmp_path: Path, vmla: Vmla, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = shutil.copytree(teacher, tmp_path / "both")
    states = {
        "generator_ema": torch.load(teacher / "model.pt")["generator_ema"],
        "generator": torch.load(other / "model.pt")["generator_ema"],
    }
    torch.save(states, both / "model.pt")
    for name, words in (("key", (both, "--set", "source.key=generator")), ("other", (other,))):
        ran = vmla("generate", *words, *FILM, tmp_path / f"{name}.mp4")
        assert ran.code == 0, ran.err
    assert (tmp_path / "key.mp4").read_bytes() == (tmp_path / "other.mp4").read_bytes()
    # Where the folder says nothing of it itself, and the demo's prompts would be none.
    table = json.loads((both / "config.json").read_text())
    del table["vmla"]
    (both / "config.json").write_text(json.dumps(table))
    assert vmla("generate", both / "model.pt", *FILM, tmp_path / "tiny.mp4").code != 0
    settings = {
        name: getattr(MODEL, name) for name in ("media", "latent_size", "frames_per_second")
    }
    tiny = KnownModel("Tiny", (), (48,), settings)
    monkeypatch.setitem(KNOWN, "tiny", tiny)
    ran = vmla("generate", both / "model.pt", "--model", "tiny", *FILM, tmp_path / "tiny.mp4")
    assert ran.code == 0, ran.err
    ran = vmla("generate", both, "--model", "self-forcing", *FILM, tmp_path / "b.mp4")
    assert refused(ran)
    assert "has a width of 1536" in ran.err


@pytest.mark.usefixtures("two")
def test_a_teacher_of_several_is_named_by_its_file(
    converted: Path, tmp_path: Path, vmla: Vmla
) -> None:
    """The conversion was made of a local file, so its record names none."""
    recover = ("recover", converted, "--teacher", TWO, *CHEAP, "-o", tmp_path / "out")
    evaluate = ("eval", converted, "--teacher", TWO, "--clips", EVALUATE.clips, "--json")
    for command in (recover, evaluate):
        assert hinted(vmla(*command)) == ["--file", "one/model.pt"]
    planned = vmla(*recover, "--file", "two", "--dry-run", "--json")
    assert planned.code == 0, planned.err
    assert "two/model.pt" in planned.out
    measured = [vmla(*evaluate, "--file", name) for name in ("one", "two")]
    assert [ran.code for ran in measured] == [0, 0], measured
    assert measured[0].out != measured[1].out
    assert vmla(*recover, "--file", "two").code == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.usefixtures("two")
def test_a_teacher_of_several_is_measured_itself(vmla: Vmla) -> None:
    ran = vmla("eval", TWO, "--teacher", TWO, "--file", "two", "--clips", EVALUATE.clips)
    assert ran.code == 0, ran.err
    assert "flow_loss_other_past" in ran.out

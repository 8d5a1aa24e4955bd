"""The command line: help, options and `--set`, and what commands print and refuse."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import typer
from checkpoints import MODEL, Vmla, refused
from conftest import tiny_model
from typer.core import TyperGroup

from vmla_convert import cli
from vmla_convert.config import ConvertConfig, DataConfig, Recipe, Sizes, command_recipe
from vmla_convert.errors import ConfigError
from vmla_convert.loading.load import load
from vmla_convert.recipe.read import available_recipes
from vmla_convert.results import Metric, Row, put_rows
from vmla_convert.training.pretrain import save_self_forcing

pytest_plugins = ["checkpoints"]

MLA = ("--preset", "videomla", "--set", "convert.init=calibrated")


def command_lines(group: TyperGroup, before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every command and group, as words."""
    yield before
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            yield from command_lines(command, (*before, name))
        else:
            yield (*before, name)


ROOT = typer.main.get_command(cli.app)
assert isinstance(ROOT, TyperGroup)
LINES = list(command_lines(ROOT))


@pytest.mark.parametrize("line", LINES, ids=" ".join)
def test_help_fits_a_terminal_and_explains_every_option(
    line: tuple[str, ...], vmla: Vmla, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    ran = vmla(*line, "--help")
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) < 80
    command: Any = ROOT
    for word in line:
        command = command.commands[word]
    for option in command.params:
        assert option.help
        assert all(name in ran.out for name in option.opts if name.startswith("--"))
    if line in {(name,) for name in cli.COMMANDS}:
        assert cli.COMMANDS[line[0]][1] in " ".join(ran.out.split())


def test_no_words_at_all_show_the_help(vmla: Vmla) -> None:
    assert "Usage: " in vmla().out


def test_help_does_not_wait_for_torch() -> None:
    program = """
import sys
from vmla_convert.__main__ import main
sys.argv = ["vmla", "--help"]
try:
    main()
finally:
    heavy = {"torch", "numpy", "scipy", "safetensors", "accelerate"} & set(sys.modules)
    assert not heavy, heavy
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "convert" in ran.stdout


def test_the_module_runs_as_the_command_does() -> None:
    command = [sys.executable, "-m", "vmla_convert", "convert", "--help"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "--bytes-per-token" in ran.stdout


@pytest.mark.parametrize(
    "line", [("convrt",), ("convert",), ("inspect", "x", "--jsn"), ("recipes", "cpy")]
)
def test_misspelt_and_missing_words_end_with_2(line: tuple[str, ...], vmla: Vmla) -> None:
    ran = vmla(*line)
    assert (ran.code, ran.out) == (2, "")
    assert "Usage: " in ran.err
    assert "Traceback" not in ran.err


def test_set_takes_keys_of_the_commands_own_tables_only(teacher: Path, vmla: Vmla) -> None:
    for change, word in (
        ("training.ema=0.9", "recover"),
        ("sweep.seeds=[1]", "evaluate"),
        ("recover.training.emma=1", "recover.training.emma"),
        ("recover.training", "key=value"),
    ):
        assert refused(ran := vmla("recover", teacher, "-o", "out", "--set", change))
        assert word in " ".join(ran.err.split())


def test_options_are_short_names_of_recipe_keys() -> None:
    tables = ("source", "model", "convert", "recover", "evaluate")
    options = {"convert.size.cut": 0.9, "convert.channels": None}
    changes = ["convert.data.source=x.safetensors", "convert.calibrate=false"]
    recipe = command_recipe(tables, options, [*changes, "model.cache.window_frames=4"])
    data = DataConfig("x.safetensors")
    assert recipe.convert == ConvertConfig(size=Sizes(cut=0.9), calibrate=False, data=data)
    assert recipe.dense.overrides == {"cache": {"window_frames": 4}}
    # A table replaces a table, a key a key; clips to measure on are those of recovery, held out.
    recipe = command_recipe(
        tables, options, ["convert.size={rank=3}", "recover.data.source=a", "recover.data.seed=4"]
    )
    assert recipe.convert == ConvertConfig(size=Sizes(rank=3))
    assert recipe.evaluate.data == DataConfig("a", seed=5)
    with pytest.raises(ConfigError):
        command_recipe(tables, options, ["convert.size.rank=3"])


def test_convert_recover_and_eval_work_one_after_the_other(
    teacher: Path, tmp_path: Path, vmla: Vmla
) -> None:
    latent, recovered = tmp_path / "latent", tmp_path / "recovered"
    size = ("--set", "convert.size.kv_lora_rank=8")
    few = ("--set", "convert.calibration_clips=2")
    ran = vmla("convert", teacher, "-o", latent, *few, *MLA, *size)
    assert ran.code == 0
    assert f"vmla recover {latent} --teacher {teacher}" in ran.err
    steps = ("--steps", "1", "--set", "recover.layerwise_steps=1", "--batch-size", "1")
    ran = vmla("recover", latent, "--teacher", teacher, "-o", recovered, *steps, "--json")
    assert ran.code == 0
    curve, kept, wrote = map(json.loads, ran.out.splitlines())
    assert [line["step"] for line in curve] == [0, 1, 2]
    assert kept["kept steps"].keys() == {"layer by layer", "distilling"}
    assert all(line["velocity_error"] > 0 for line in curve)
    losses = {kept["flow loss of the dense model"], *(line["flow_loss"] for line in curve)}
    assert min(losses) > 0 and len(losses) > 2
    assert wrote == {"wrote": str(recovered)}
    ran = vmla("eval", recovered, "--teacher", teacher, "--clips", "9", "--json")
    assert ran.code == 0
    (rows,) = map(json.loads, ran.out.splitlines())
    told = {(row["run"], row["metric"]): row["value"] for row in rows}
    run = "mla-calibrated-8+6-joint"
    assert told[run, "cache_bytes_per_token"] == 2 * 15
    assert told["dense", "cache_bytes_per_token"] == 2 * 96
    assert told[run, "velocity_error"] > 0


def test_convert_says_what_was_really_cut(teacher: Path, tmp_path: Path, vmla: Vmla) -> None:
    words = ("--cut", "0.9", "--set", "convert.calibration_clips=1", "--json")
    ran = vmla("convert", teacher, "-o", tmp_path / "out", *words)
    assert ran.code == 0
    told, wrote = map(json.loads, ran.out.splitlines())
    assert told["cache cut"] >= 0.9
    assert told["bytes cached per token and layer"] <= 2 * 9.6
    assert told["seconds"] > 0
    assert wrote == {"wrote": str(tmp_path / "out")}
    planned = vmla("convert", teacher, "-o", tmp_path / "new", "--dry-run", *words)
    assert json.loads(planned.out)["cache_cut"] >= 0.9
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_eval_of_the_dense_model_tells_of_it_alone(teacher: Path, vmla: Vmla) -> None:
    ran = vmla("eval", teacher, "--teacher", teacher, "--clips", "2")
    assert ran.code == 0
    assert "flow_loss_other_past" in ran.out
    assert "velocity_error" not in ran.out


def test_eval_refuses_a_dense_model_that_is_not_the_teacher(
    teacher: Path, tmp_path: Path, vmla: Vmla
) -> None:
    other = tmp_path / "other"
    save_self_forcing(tiny_model(MODEL, seed=1).state_dict(), MODEL, other)
    assert refused(ran := vmla("eval", other, "--teacher", teacher, "--clips", "2"))
    assert str(other) in ran.err
    copied = shutil.copytree(teacher, tmp_path / "copied")
    assert vmla("eval", copied, "--teacher", teacher, "--clips", "2").code == 0


def test_eval_refuses_a_converted_teacher(converted: Path, vmla: Vmla) -> None:
    assert refused(vmla("eval", converted, "--teacher", converted))


def test_generate_writes_a_video_and_its_first_frame(
    converted: Path, tmp_path: Path, vmla: Vmla
) -> None:
    video = tmp_path / "clips" / "a.mp4"
    ran = vmla("generate", converted, "--prompt", "7", "--prompt", "a two", "-o", video,
               "--frames", "3")  # fmt: skip
    assert ran.code == 0
    assert {path.name for path in video.parent.iterdir()} == {"a.mp4", "a.png"}
    model = load(converted)
    nbytes = model.new_cache(2).nbytes
    assert nbytes == model.cache_bytes(2)
    assert ran.out.splitlines() == [
        f"cache of converted (bytes)  {nbytes}",
        f"wrote: {video}",
        f"wrote: {video.with_suffix('.png')}",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--set", "runtime.backend=absorbd"), "absorbd"),
        (("--set", "runtime.dtype=int8"), "int8"),
        (("--prompt-at", "soon:2"), "soon:2"),
        (("--prompt-at", "2s:a cat"), "a cat"),
        (("--seconds", "0"), "--seconds"),
        (("--seconds", "1", "--frames", "4"), "--frames"),
        (("--image", "nowhere.png"), "nowhere.png"),
        (("--set", "model.cache.window_frames=1"), "model.cache.window_frames"),
        (("--set", "model.cache.dense_recent_frames=2"), "dense_recent_frames"),
        (("--set", "model.licence=mine"), "cache.*"),
        (("--compare", "nowhere"), "nowhere"),
    ],
)
def test_generate_refuses_before_any_work(
    options: tuple[str, ...],
    message: str,
    budgeted: Path,
    tmp_path: Path,
    vmla: Vmla,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("vmla_convert.generating.write_video.build", never)
    ran = vmla("generate", budgeted, "--prompt", "7", "-o", tmp_path / "a.mp4", *options)
    assert refused(ran)
    assert message in ran.err


def test_a_dense_cache_is_not_absorbed(teacher: Path, tmp_path: Path, vmla: Vmla) -> None:
    ran = vmla("generate", teacher, "--prompt", "7", "-o", tmp_path / "a.mp4",
               "--set", "runtime.backend=absorbed")  # fmt: skip
    assert refused(ran)
    assert "MLA" in ran.err


def test_eval_measures_the_cache_that_is_asked_for(
    budgeted: Path, teacher: Path, vmla: Vmla
) -> None:
    options = ("eval", budgeted, "--teacher", teacher, "--clips", "2", "--json")

    def measured(*more: str) -> dict[str, float]:
        table = json.loads(vmla(*options, *more).out)
        return {row["metric"]: row["value"] for row in table if row["run"] != "dense"}

    streamed, narrow = (
        ("--set", f"model.cache.{word}") for word in ("sink_frames=2", "window_frames=4")
    )
    told = measured(), measured(*streamed), measured(*narrow)
    # A random model tells no better from worse.
    assert len({each["velocity_error"] for each in told}) == 3


def frame_size(video: Path) -> tuple[int, int]:
    import av

    with av.open(str(video)) as file:
        stream = file.streams.video[0]
        assert len(list(file.decode(stream))) == 2
        return stream.width, stream.height


def test_generate_compares_from_the_same_noise(
    teacher: Path, converted: Path, tmp_path: Path, vmla: Vmla
) -> None:
    alone, beside = tmp_path / "alone.mp4", tmp_path / "beside.mp4"
    common = ("--prompt", "7", "--frames", "2")
    assert vmla("generate", teacher, *common, "-o", alone).code == 0
    assert vmla("generate", converted, *common, "-o", beside, "--compare", teacher).code == 0
    (width, height), (wider, same) = frame_size(alone), frame_size(beside)
    assert (wider > 2 * width, same) == (True, height)


def test_generate_tells_checkpoints_of_one_name_apart(
    converted: Path, tmp_path: Path, vmla: Vmla
) -> None:
    other = shutil.copytree(converted, tmp_path / converted.name)
    common = ("--prompt", "7", "--frames", "2", "-o", tmp_path / "a.mp4")
    ran = vmla("generate", converted, *common, "--compare", other)
    assert ran.code == 0
    assert all(f"generating ({path})" in ran.err for path in (converted, other))


def test_generate_refuses_to_compare_a_checkpoint_with_itself(
    converted: Path, tmp_path: Path, vmla: Vmla
) -> None:
    common = ("--prompt", "7", "-o", tmp_path / "a.mp4")
    assert refused(vmla("generate", converted, *common, "--compare", converted))


@pytest.mark.parametrize("name", ["a.gif", "taken.mp4", "sheet.mp4"])
def test_generate_refuses_a_bad_place_before_it_loads(
    name: str, tmp_path: Path, vmla: Vmla
) -> None:
    mine = [tmp_path / "taken.mp4", tmp_path / "sheet.png"]
    for file in mine:
        file.write_text("mine")
    ran = vmla("generate", tmp_path / "nothing", "--prompt", "7", "-o", tmp_path / name)
    assert refused(ran)
    assert Path(name).stem in ran.err
    assert all(file.read_text() == "mine" for file in mine)


@pytest.mark.parametrize("prompt", ["a cat", "1 or 2"])
def test_generate_refuses_a_prompt_without_one_digit(
    prompt: str, teacher: Path, tmp_path: Path, vmla: Vmla
) -> None:
    assert refused(vmla("generate", teacher, "--prompt", prompt, "-o", tmp_path / "a.mp4"))
    ran = vmla("generate", teacher, "--prompt", "7", "-o", tmp_path / "a.mp4", "--frames", "0")
    assert ran.code == 2
    assert not list(tmp_path.iterdir())


def test_report_is_written_from_rows(tmp_path: Path, vmla: Vmla) -> None:
    rows = [
        Row(metric, value, "1", "mla-random-8+4-joint", product="mla", init="random", step=0,
            bytes_per_token=26.0, kv_lora_rank=8, qk_rope_head_dim=4)
        for metric, value in ((Metric.VELOCITY_ERROR, 0.1), (Metric.FLOW_LOSS, 0.2))
    ]  # fmt: skip
    put_rows(tmp_path / "rows.jsonl", [*rows, Row(Metric.FLOW_LOSS, 0.15, "1", "dense")])
    ran = vmla("report", tmp_path, "--title", "Mine", "--loss-bound", "0.4")
    assert ran.code == 0
    assert f"wrote: {tmp_path / 'report.md'}" in ran.out.splitlines()
    assert (tmp_path / "report.md").read_text().startswith("# Mine")
    answer = (tmp_path / "report.md").read_text().split("##")[1]
    assert all(fact in answer for fact in ("26 bytes", "40 %", "+33 %"))


def test_report_refuses_a_folder_without_rows(tmp_path: Path, vmla: Vmla) -> None:
    assert refused(vmla("report", tmp_path))
    assert not list(tmp_path.iterdir())


def test_recipes_are_listed_and_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vmla: Vmla
) -> None:
    ran = vmla("recipes")
    assert ran.code == 0
    assert all(name in ran.out for name in available_recipes())
    monkeypatch.chdir(tmp_path)
    ran = vmla("recipes", "copy", "quickstart")
    assert (ran.code, ran.out) == (0, "wrote: quickstart.toml\n")
    assert (tmp_path / "quickstart.toml").is_file()
    assert refused(vmla("recipes", "copy", "quickstart"))
    assert refused(ran := vmla("recipes", "copy", "quikstart"))
    assert "quickstart" in ran.err


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Recipe, Path, object]]:
    """The recipes that a command ran, in place of running them."""
    calls: list[tuple[Recipe, Path, object]] = []

    def record(recipe: Recipe, folder: Path, _: object, only: object) -> bool:
        calls.append((recipe, folder, only))
        folder.mkdir()
        (folder / "made").touch()
        return True

    monkeypatch.setattr("vmla_convert.recipe.run.run_recipe", record)
    return calls


def test_demo_runs_the_quickstart(
    tmp_path: Path, started: list[tuple[Recipe, Path, object]], vmla: Vmla
) -> None:
    ran = vmla("demo", "-o", tmp_path / "out")
    assert ran.code == 0
    ((recipe, folder, _),) = started
    assert (recipe.recipe.name, folder) == ("quickstart", tmp_path / "out")
    assert ran.out == f"wrote: {tmp_path / 'out' / 'made'}\n"


def test_sweep_runs_the_sweep_and_the_report_alone(
    tmp_path: Path, started: list[tuple[Recipe, Path, object]], vmla: Vmla
) -> None:
    setting = ("--set", "sweep.seeds=[5]")
    assert vmla("sweep", "quickstart", "-o", tmp_path / "out", *setting).code == 0
    ((recipe, _, only),) = started
    assert recipe.sweep and recipe.sweep.seeds == (5,)
    assert only == ("sweep", "report")


def test_a_model_moves_with_its_folder(converted: Path, tmp_path: Path, vmla: Vmla) -> None:
    moved = shutil.copytree(converted, tmp_path / "elsewhere")
    told = [json.loads(vmla("inspect", path, "--json").out) for path in (converted, moved)]
    assert told[0] | {"path": ""} == told[1] | {"path": ""}


@pytest.fixture
def interrupted(
    teacher: Path, tmp_path: Path, vmla: Vmla, monkeypatch: pytest.MonkeyPatch
) -> tuple[str | Path, ...]:
    """A convert in which Ctrl-C was pressed at the first layer."""

    def press(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    words = ("convert", teacher, "-o", tmp_path / "out", "--preset", "videomla")
    with monkeypatch.context() as patch:
        patch.setattr("vmla_convert.fitting.write.factor_layer", press)
        ran = vmla(*words)
    assert (ran.code, ran.out) == (130, "")
    assert "interrupted" in ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    return words


def test_an_interrupted_convert_goes_on_with_resume(
    interrupted: tuple[str | Path, ...], tmp_path: Path, vmla: Vmla
) -> None:
    assert refused(ran := vmla(*interrupted))
    assert "--resume" in ran.err
    ran = vmla(*interrupted, "--resume")
    assert ran.code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert vmla("inspect", tmp_path / "out").code == 0


def test_resume_with_other_settings_is_refused(
    interrupted: tuple[str | Path, ...], tmp_path: Path, vmla: Vmla
) -> None:
    assert refused(ran := vmla(*interrupted, "--resume", "--set", "convert.seed=3"))
    assert str(tmp_path / "out.partial") in ran.err

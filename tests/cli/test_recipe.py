"""Recipes parse strictly, run all their stages into one folder, and go on after an interruption."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from checkpoints import PowerCut, PowerCutError, Vmla, refused, untimed
from safetensors.torch import save_file

from vmla_convert.checkpoint.hub import is_repo
from vmla_convert.checkpoint.known import known_by_repo
from vmla_convert.config import STAGES, ConvertConfig, RankPlan, Sizes
from vmla_convert.errors import ConfigError, OutputError, VmlaError
from vmla_convert.loading.load import load
from vmla_convert.recipe.check import check_recipe
from vmla_convert.recipe.read import available_recipes, copy_recipe, read_recipe
from vmla_convert.recipe.run import run_recipe
from vmla_convert.results import Row, read_rows
from vmla_convert.sweep.grid import SweepPoint
from vmla_convert.training.processes import check_shares

pytest_plugins = ["checkpoints"]
pytestmark = pytest.mark.usefixtures("few_layerwise_clips")

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "recipes").rglob("*.toml"))

RANDOM, CALIBRATED = (f"mla-{init}-8+4-joint" for init in ("random", "calibrated"))
POINTS = ("codec", RANDOM, CALIBRATED)
TINY = """
[recipe]
name = "tiny"
description = "Every stage but pretraining, on a tiny checkpoint"

[source]
checkpoint = "{teacher}"

[evaluate]
clips = 4
data = {{ frames = 6, seed = 1 }}

[convert]
product = "mla"
size = {{ kv_lora_rank = 8, qk_rope_head_dim = 4 }}
calibration_clips = 4
data = {{ frames = 6 }}

[recover]
layerwise_steps = 2
data = {{ frames = 6 }}
training = {{ steps = 3, batch_size = 2, eval_every = 1, checkpoint_every = 2 }}

[sweep]
products = ["codec", "mla"]
sizes = [{{ bytes_per_token = 8 }}]
dense_dtypes = ["int2"]
inits = ["random", "calibrated"]
mla_sizes = [{{ kv_lora_rank = 8, qk_rope_head_dim = 4 }}]

[generate]
prompts = ["3", "seven"]
shown = 1
frames = 10

[report]
title = "A tiny report"
"""


@pytest.fixture(scope="session")
def tiny(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of seconds."""
    file = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    file.write_text(TINY.format(teacher=teacher))
    return file


@pytest.fixture(scope="module")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    out = tmp_path_factory.mktemp("run") / "out"
    run_recipe(read_recipe(tiny), out)
    return out


def comparable(out: Path) -> list[Row]:
    return [row for row in untimed(read_rows(out / "rows.jsonl")) if row.unit != "bytes"]


def test_the_dense_model_and_every_point_have_their_memory(finished: Path) -> None:
    told = [row for row in read_rows(finished / "rows.jsonl") if row.metric == "cache_bytes"]
    lengths = {(batch, seconds) for batch in (1, 4, 16) for seconds in (None, 5, 30, 60)}
    runs = ("dense", "dense int2", *POINTS)
    for run in runs:
        own = [(row.batch, row.clip_seconds) for row in told if row.run == run]
        assert len(own) == len(lengths)
        assert set(own) == lengths
    assert len(told) == len(runs) * len(lengths)


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_there_are_recipes_and_they_are_found_by_name() -> None:
    assert SHIPPED
    known = available_recipes()
    assert {"quickstart", "teacher_moving_digits"} <= known.keys()
    assert read_recipe("quickstart") == read_recipe(known["quickstart"])


def test_an_installed_package_reads_its_own_recipes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "vmla_convert"
    for folder in (package / "recipes_data", tmp_path / "recipes"):
        folder.mkdir(parents=True)
        (folder / f"of_{folder.name}.toml").touch()
    monkeypatch.setattr("vmla_convert.recipe.read.files", lambda _: package)
    assert available_recipes().keys() == {"of_recipes_data"}


REAL = [file for file in SHIPPED if read_recipe(file).source.checkpoint != "demo"]


def test_the_recipes_of_real_checkpoints_name_models_that_are_known() -> None:
    assert {file.stem for file in REAL} == {
        "size_ablation",
        "init_ablation",
        "self_forcing_1_3b",
        "causal_forcing_1_3b",
        "longlive_1_3b",
        "krea_14b",
        "wan_1_3b",
    }
    for file in REAL:
        source = read_recipe(file).source
        assert is_repo(source.checkpoint)
        assert known_by_repo(source.checkpoint, source.file)


@pytest.mark.parametrize("file", REAL, ids=lambda file: file.stem)
def test_the_recipe_of_a_real_checkpoint_trains_on_one_clip_at_a_time(file: Path) -> None:
    recipe, scaled = read_recipe(file), read_recipe(file, demo=True)
    assert recipe.recover and scaled.recover
    training, processes = recipe.recover.training, 8 if recipe.recover.shard else 1
    assert training.batch_size == training.accumulate * processes
    check_shares(training, processes)
    check_shares(scaled.recover.training, 1)


@pytest.mark.parametrize("file", REAL, ids=lambda file: file.stem)
def test_a_recipe_scaled_to_the_demo_keeps_its_stages(file: Path) -> None:
    recipe, scaled = read_recipe(file), read_recipe(file, ["evaluate.clips=3"], demo=True)
    assert scaled.stages() == recipe.stages()
    assert scaled.evaluate.clips == 3


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_every_recipe_parses_and_dry_runs(file: Path, tmp_path: Path, vmla: Vmla) -> None:
    recipe = read_recipe(file)
    assert recipe.stages()
    assert recipe.recipe.name == file.stem
    assert recipe.recipe.description
    # A real checkpoint lies on the Hub; the same recipe, scaled, is checked to the end.
    scaled = () if recipe.source.checkpoint == "demo" else ("--demo",)
    recipe = read_recipe(file, demo=bool(scaled))
    assert recipe.source.checkpoint == "demo"
    cuts = [size.cut or 0.0 for size in recipe.sweep.sizes] if recipe.sweep else []
    # The largest cut is the one that may not fit; a check of all points takes seconds.
    hardest = ("--set", f"sweep.sizes=[{{cut={max(cuts)}}}]") if cuts else ()
    ran = vmla("run", file, "-o", tmp_path / "out", "--dry-run", *scaled, *hardest)
    assert ran.code == 0
    assert ", ".join(recipe.stages()) in ran.out
    assert ("points" in ran.out) == ("sweep" in recipe.stages())
    assert not list(tmp_path.iterdir())


def test_a_sweep_says_beforehand_how_many_points_it_has(tmp_path: Path, vmla: Vmla) -> None:
    wanted = ("--demo", "--set", "sweep.seeds=[0, 1, 2]")
    ran = vmla("sweep", "size_ablation", "-o", tmp_path / "out", "--dry-run", *wanted)
    assert ran.code == 0
    assert re.search(r"^points +6 *$", ran.out, re.MULTILINE)
    assert re.search(r"^stages +sweep, report *$", ran.out, re.MULTILINE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dry", [("--dry-run",), ()])
def test_clips_that_are_not_there_name_the_demo_where_the_recipe_has_one(
    dry: tuple[str, ...], tiny: Path, tmp_path: Path, vmla: Vmla
) -> None:
    missing = ("--set", "convert.data.source=nowhere")
    offered = vmla("sweep", "size_ablation", "-o", tmp_path / "out", *missing, *dry)
    scaled = vmla("sweep", "size_ablation", "-o", tmp_path / "out", "--demo", *missing, *dry)
    plain = vmla("sweep", tiny, "-o", tmp_path / "out", *missing, *dry)
    for ran in (offered, scaled, plain):
        assert refused(ran)
        assert "no clips at nowhere" in ran.err
        assert "safetensors" in ran.err
    assert "--demo" in offered.err
    assert "--demo" not in scaled.err + plain.err
    assert not list(tmp_path.iterdir())


def test_of_processes_that_dry_run_together_one_speaks(
    tiny: Path, tmp_path: Path, vmla: Vmla, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        ran = vmla("sweep", tiny, "-o", tmp_path / "out", "--dry-run")
        assert ran.code == 0
        told.append(ran.out)
    assert "points" in told[0]
    assert told[1] == ""


def test_a_recipe_may_name_latent_budget_rule_and_plan(tmp_path: Path) -> None:
    text = (
        INFO
        + """
[convert]
product = "mla"
latent = "split"
size = { cut = 0.9 }
calibrate = false
"""
    )
    recipe = read_recipe(written(tmp_path / "x.toml", text))
    assert recipe.convert == ConvertConfig("mla", Sizes(cut=0.9), latent="split", calibrate=False)
    overrides = ["convert.size={plan={kv_lora_rank=[8, 9], rope_pairs=[1, 1]}}"]
    recipe = read_recipe(tmp_path / "x.toml", overrides)
    assert recipe.convert and recipe.convert.size == Sizes(plan=RankPlan((8, 9), (1, 1)))


def test_stages_run_in_their_own_order_whatever_the_file_says(tmp_path: Path) -> None:
    text = '[report]\n[convert]\n[recipe]\nname = "x"\ndescription = "y"\n[recover]\n'
    recipe = read_recipe(written(tmp_path / "x.toml", text))
    assert recipe.stages() == ["convert", "recover", "report"]
    assert recipe.source.checkpoint == "demo"


INFO = '[recipe]\nname = "x"\ndescription = "y"\n'
# What is wrong, and what the message or the hint must say.
BAD_FILES = {
    "misspelt stage": (INFO + "[conver]\n", "'conver'", "did you mean 'convert'?"),
    "misspelt key": (INFO + "[convert]\nchanels = 4\n", "chanels", "'channels'?"),
    "misspelt nested key": (
        INFO + "[recover.training]\nstep = 4\n",
        "'recover.training.step'",
        "did you mean 'steps'?",
    ),
    "misspelt choice": (
        INFO + "[sweep]\nlatents = ['splt']\n",
        "'sweep.latents[0]'",
        "did you mean 'split'?",
    ),
    "wrong type": (INFO + '[convert]\nchannels = "4"\n', "convert.channels", ""),
    "no name": ("[convert]\n", "[recipe]", ""),
    "no TOML": ("[recipe", "not valid TOML", ""),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused(name: str, tmp_path: Path, vmla: Vmla) -> None:
    text, message, hint = BAD_FILES[name]
    file = written(tmp_path / "x.toml", text)
    with pytest.raises(ConfigError) as caught:
        read_recipe(file)
    assert message in caught.value.message
    assert hint in caught.value.hint
    ran = vmla("run", file, "-o", tmp_path / "out")
    assert (ran.code, ran.out) == (2, "")
    assert caught.value.message in ran.err
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("name", ["quickstrt", "no/such/file.toml"])
def test_a_recipe_that_is_not_there_is_refused(name: str, tmp_path: Path, vmla: Vmla) -> None:
    assert refused(ran := vmla("run", name, "-o", tmp_path / "out"))
    assert "quickstart" in ran.err
    assert not list(tmp_path.iterdir())


def test_overrides_reach_nested_keys_lists_and_bare_strings(tiny: Path) -> None:
    recipe = read_recipe(
        tiny,
        [
            "convert.init=spectral",
            'recipe.description="quoted"',
            "recover.training.steps=7",
            "recover.training.lr=1e-4",
            "sweep.mla_sizes=[{kv_lora_rank=2}, {cut=0.9}]",
        ],
    )
    assert recipe.convert and recipe.recover and recipe.sweep
    assert recipe.convert.init == "spectral"
    assert recipe.recipe.description == "quoted"
    assert recipe.recover.training.steps == 7
    assert recipe.recover.training.lr == 1e-4
    assert recipe.recover.training.batch_size == 2  # as the file says
    assert recipe.sweep.mla_sizes == (Sizes(kv_lora_rank=2), Sizes(cut=0.9))


def test_an_override_may_add_a_stage(tmp_path: Path) -> None:
    file = written(tmp_path / "x.toml", INFO)
    recipe = read_recipe(file, ["recover.training.steps=7"])
    assert recipe.recover and recipe.recover.training.steps == 7


BAD_OVERRIDES = {
    "no equals": ("convert.init", "key=value"),
    "no key": ("=3", "key=value"),
    "odd key": ("con vert=3", "key=value"),
    "misspelt": ("convert.inti=random", "'init'"),
    "into a value": ("convert.product.x=1", "'product' is a value"),
    "a stage as a value": ("convert=1", "must be a table"),
    "wrong type": ("recover.training.steps=many", "must be int"),
}


@pytest.mark.parametrize("name", BAD_OVERRIDES)
def test_a_bad_override_is_refused(name: str, tiny: Path, tmp_path: Path, vmla: Vmla) -> None:
    override, word = BAD_OVERRIDES[name]
    with pytest.raises(ConfigError) as caught:
        read_recipe(tiny, [override])
    assert word in caught.value.message + caught.value.hint
    ran = vmla("run", tiny, "-o", tmp_path / "out", "--set", override)
    assert (ran.code, ran.out) == (2, "")
    assert not list(tmp_path.iterdir())


# A change to the recipe of seconds, and what the message must say.
UNFIT = {
    "no checkpoint": ("source.checkpoint=no/such.pt", "no/such.pt"),
    "unknown init": ("convert.init=calibratd", "'calibratd'"),
    "rank above the width": ("convert.size.kv_lora_rank=1000", "1000"),
    "unknown init in the sweep": ('sweep.inits=["random", "spectrl"]', "'spectrl'"),
    "odd rope in the sweep": ("sweep.mla_sizes=[{kv_lora_rank=8, qk_rope_head_dim=7}]", "7"),
    "empty sweep": ("sweep.seeds=[]", "empty"),
    "a size of MLA without MLA": ('sweep.products=["codec"]', "mla_sizes"),
    "a size that no codec holds": ("sweep.sizes=[{bytes_per_token=8}, {bytes_per_token=97}]", "97"),
    "a setting of MLA for a codec": ("convert.product=codec", "kv_lora_rank"),
    "a cut of everything in the sweep": ("sweep.sizes=[{cut=0.9}, {cut=1.0}]", "cut 1"),
    "two sizes": ("convert.size.cut=0.9", "given twice"),
    "a prompt of no digit": ('generate.prompts=["3", "a cat"]', "'a cat'"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_settings_that_do_not_fit_are_refused_before_anything_is_written(
    name: str, tiny: Path, tmp_path: Path, vmla: Vmla
) -> None:
    override, word = UNFIT[name]
    ran = vmla("run", tiny, "-o", tmp_path / "out", "--set", override)
    assert refused(ran)
    assert word in ran.err
    assert not list(tmp_path.iterdir())


# Which clips, what is wrong with them, and what the message must say; None is no file.
Shapes = tuple[tuple[int, ...], tuple[int, ...]]
GOOD_CLIPS: Shapes = ((2, 6, 12, 12, 12), (2, 1, 10))
BAD_CLIPS: dict[str, tuple[Shapes | None, str]] = {
    "not there": (None, "no clips at"),
    "one clip": (((1, 6, 12, 12, 12), (1, 1, 10)), "holds 1 clips"),
    "too short": (((2, 3, 12, 12, 12), (2, 1, 10)), "no chunk with a past"),
    "of another media": (((2, 6, 16, 12, 12), (2, 1, 10)), "16"),
    "of another text encoder": (((2, 6, 12, 12, 12), (2, 1, 16)), "16"),
}


def store_clips(file: Path, shapes: Shapes) -> Path:
    names = ("latents", "context")
    save_file({name: torch.ones(s) for name, s in zip(names, shapes, strict=True)}, file)
    return file


@pytest.mark.parametrize("stage", ["convert", "recover", "evaluate"])
@pytest.mark.parametrize("name", BAD_CLIPS)
def test_a_dry_run_refuses_clips_that_do_not_fit(
    name: str, stage: str, tiny: Path, tmp_path: Path, vmla: Vmla
) -> None:
    (shapes, word), file = BAD_CLIPS[name], tmp_path / "clips.safetensors"
    if shapes:
        store_clips(file, shapes)
    for command in ("run", "sweep"):
        override = f"{stage}.data.source={file}"
        ran = vmla(command, tiny, "-o", tmp_path / "out", "--dry-run", "--set", override)
        assert refused(ran)
        assert word in ran.err
    assert list(tmp_path.iterdir()) == [file][: bool(shapes)]


@pytest.mark.parametrize("stage", ["convert", "recover", "evaluate"])
def test_a_dry_run_takes_clips_that_fit(stage: str, tiny: Path, tmp_path: Path, vmla: Vmla) -> None:
    file = store_clips(tmp_path / "clips.safetensors", GOOD_CLIPS)
    for command in ("run", "sweep"):
        override = f"{stage}.data.source={file}"
        ran = vmla(command, tiny, "-o", tmp_path / "out", "--dry-run", "--set", override)
        assert ran.code == 0, ran.err
    assert list(tmp_path.iterdir()) == [file]


# Changes to the recipe of seconds, what the message must say, and which commands must say it.
UNFIT_TOGETHER = {
    "a prompt of no digit": (
        ("sweep.rollout_frames=4", 'sweep.rollout_prompts=["3", "a cat"]'),
        "'a cat'",
        ("run", "sweep"),
    ),
    "a batch that does not divide": (
        ("recover.training.accumulate=3",),
        "batch_size 2",
        ("run", "sweep"),
    ),
    "a tracker that is not there": (
        ("recover.training.tracker=trackio",),
        "trackio",
        ("run", "sweep"),
    ),
    "prompts of own samples": (
        ("recover.data.source=self", 'recover.data.prompts=["a cat", "3"]'),
        "'a cat'",
        ("run",),
    ),
    "one prompt, none of which is held out": (
        ("recover.data.source=self", 'recover.data.prompts=["3"]'),
        "--prompts",
        ("run", "sweep"),
    ),
    "shards in one process": (("recover.shard=true",), "there is one", ("run",)),
}


@pytest.mark.parametrize("name", UNFIT_TOGETHER)
def test_a_dry_run_refuses_what_a_later_stage_would(
    name: str, tiny: Path, tmp_path: Path, vmla: Vmla, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmla_convert.training.loop.find_spec", lambda _: None)
    changes, word, commands = UNFIT_TOGETHER[name]
    overrides = [part for change in changes for part in ("--set", change)]
    for command in commands:
        ran = vmla(command, tiny, "-o", tmp_path / "out", "--dry-run", *overrides)
        assert refused(ran), ran
        assert word in ran.err
    assert not list(tmp_path.iterdir())


def test_clips_that_a_finished_stage_looked_at_may_be_gone(tiny: Path, tmp_path: Path) -> None:
    out, file = tmp_path / "out", store_clips(tmp_path / "clips.safetensors", GOOD_CLIPS)
    recipe = read_recipe(tiny, [f"convert.data.source={file}"])
    run_recipe(recipe, out, only=("convert",))
    check_recipe(recipe, out, ("convert", "recover"))
    file.unlink()
    check_recipe(recipe, out, ("convert", "recover"))
    with pytest.raises(ConfigError, match="no clips at"):
        check_recipe(recipe, tmp_path / "other", ("convert", "recover"))


@pytest.mark.parametrize("stage", ["recover", "generate", "report"])
def test_a_stage_without_its_input_is_refused_before_anything_is_written(
    stage: str, teacher: Path, tmp_path: Path, vmla: Vmla
) -> None:
    text = f'{INFO}[source]\ncheckpoint = "{teacher}"\n[{stage}]\n'
    file = written(tmp_path / "x.toml", text)
    assert refused(ran := vmla("run", file, "-o", tmp_path / "out"))
    assert f"the {stage} stage" in ran.err
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("command", ["run", "sweep"])
def test_a_recipe_with_nothing_to_do_is_refused(command: str, tmp_path: Path, vmla: Vmla) -> None:
    file = written(tmp_path / "x.toml", INFO + ("[convert]\n" if command == "sweep" else ""))
    assert refused(ran := vmla(command, file, "-o", tmp_path / "out"))
    assert "no stage to run" in ran.err
    assert list(tmp_path.iterdir()) == [file]


def test_a_converted_source_is_refused(
    tiny: Path, converted: Path, tmp_path: Path, vmla: Vmla
) -> None:
    for command in ("run", "sweep"):
        override = f"source.checkpoint={converted}"
        assert refused(ran := vmla(command, tiny, "-o", tmp_path / "out", "--set", override))
        assert "converted already" in ran.err
    assert not list(tmp_path.iterdir())


def test_only_the_stages_that_will_run_are_checked(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    recipe = read_recipe(tiny, ['sweep.inits=["spectrl"]', 'generate.prompts=["a cat"]'])
    check_recipe(recipe, out, ("convert", "recover", "report"))
    with pytest.raises(ConfigError):
        check_recipe(recipe, out, ("sweep", "report"))
    check_recipe(read_recipe("teacher_moving_digits"), out)
    assert not list(tmp_path.iterdir())


def test_a_run_may_convert_the_teacher_that_it_trains(tmp_path: Path) -> None:
    out = tmp_path / "out"
    recipe = read_recipe(
        "teacher_moving_digits", ["convert.size.cut=0.9", f"source.checkpoint={out}/checkpoint"]
    )
    check_recipe(recipe, out)
    with pytest.raises(VmlaError):
        check_recipe(recipe, out, ("convert",))


def test_a_copied_recipe_is_the_same_and_never_overwrites(tmp_path: Path) -> None:
    copied = copy_recipe("quickstart", tmp_path)
    assert copied == tmp_path / "quickstart.toml"
    assert copied.read_bytes() == available_recipes()["quickstart"].read_bytes()
    copied.write_text("mine")
    with pytest.raises(OutputError) as caught:
        copy_recipe("quickstart", tmp_path)
    assert caught.value.hint
    assert copied.read_text() == "mine"
    with pytest.raises(ConfigError) as caught:
        copy_recipe("quikstart", tmp_path)
    assert "quickstart" in caught.value.hint


def test_a_run_leaves_the_model_the_rows_the_report_and_the_videos(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {
        "converted",
        "recipe.json",
        "recipe.toml",
        "rows.jsonl",
        "report.md",
        "report.html",
        "plots",
        "compare.mp4",
        "compare.png",
    }
    mla = load(finished / "converted").config.mla
    assert mla is not None and mla.kv_lora_rank == (8, 8)
    assert "A tiny report" in (finished / "report.md").read_text()
    assert "compare.png" in (finished / "report.md").read_text()


def test_a_run_leaves_every_figure_once(finished: Path) -> None:
    rows = read_rows(finished / "rows.jsonl")
    keys = [replace(row, value=0.0) for row in rows]
    assert len(set(keys)) == len(keys)
    curves = {
        run: [row.step for row in rows if (row.metric, row.run) == ("velocity_error", run)]
        for run in POINTS
    }
    assert set(map(tuple, curves.values())) == {(0, 2, 3, 4, 5)}
    for metric in ("convert_seconds", "factor_seconds", "peak_rss_bytes", "recover_seconds"):
        assert any((row.metric, row.run) == (metric, CALIBRATED) for row in rows)
    scored = {row.run for row in rows if row.metric == "digit_accuracy"}
    assert scored == {"dense", CALIBRATED}
    # The sweep has the calibrated point from the stages before it.
    spectra = {row.run for row in rows if row.metric == "effective_rank_99"}
    assert spectra == {"weights", "weights_x_activations", RANDOM}
    points = {row.run: row.point for row in rows if row.run in POINTS}
    assert len(set(points.values()) - {None}) == 3


@pytest.mark.slow
def test_a_run_interrupted_in_every_stage_finishes_with_the_same_rows(
    tiny: Path, finished: Path, tmp_path: Path
) -> None:
    out, recipe = tmp_path / "out", read_recipe(tiny)
    for label, before in (
        ("calibrating", 0),
        ("weighing errors", 1),
        ("converting", 1),
        ("layer by layer", 1),
        ("distilling", 1),
        ("sweep", 0),
        ("rolling out converted", 2),
    ):
        with pytest.raises(PowerCutError):
            run_recipe(recipe, out, PowerCut(label, before))
    run_recipe(recipe, out)
    assert comparable(out) == comparable(finished)
    assert {path.name for path in out.iterdir()} == {path.name for path in finished.iterdir()}
    weights = (out / "converted" / "model.safetensors").read_bytes()
    assert weights == (finished / "converted" / "model.safetensors").read_bytes()


def test_a_codec_goes_through_every_stage(teacher: Path, tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "codec.toml"
    file.write_text(CODEC.format(teacher=teacher))
    with pytest.raises(PowerCutError):
        run_recipe(read_recipe(file), out, PowerCut("distilling", 1))
    run_recipe(read_recipe(file), out)
    model = load(out / "converted")
    assert model.config.codec is not None and model.config.codec.size.cut == 0.9
    assert (out / "converted" / "codec.safetensors").is_file()
    rows = [row for row in read_rows(out / "rows.jsonl") if row.run == "codec"]
    assert {"convert_seconds", "recover_seconds", "digit_accuracy"} <= {row.metric for row in rows}
    (key,) = {row.point for row in rows}
    recipe = read_recipe(file)
    assert recipe.convert
    assert key == SweepPoint(recipe.convert, recipe.recover).key


CODEC = """
[recipe]
name = "codec"
description = "a codec"
[source]
checkpoint = "{teacher}"
[evaluate]
clips = 4
data = {{ frames = 6, seed = 1 }}
[convert]
size = {{ cut = 0.9 }}
calibration_clips = 4
data = {{ frames = 6 }}
[recover]
layerwise_steps = 2
nested = [0.9, 0.8]
data = {{ frames = 6 }}
training = {{ steps = 2, batch_size = 2, eval_every = 1, checkpoint_every = 1, lr = 1e-3 }}
[generate]
prompts = ["3"]
shown = 1
frames = 4
"""


def test_only_the_stages_asked_for_run(tiny: Path, tmp_path: Path) -> None:
    run_recipe(read_recipe(tiny), tmp_path / "out", only=("convert",))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "converted-step0",
        "recipe.json",
        "rows.jsonl",
    }


def test_a_sweep_that_came_to_its_end_grows_and_tries_failed_points_again(
    teacher: Path, tmp_path: Path, vmla: Vmla, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = tmp_path / "recipe.toml", tmp_path / "out"
    recipe.write_text(SWEEP_ALONE.format(teacher=teacher))

    def failing(*_: object) -> NoReturn:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("vmla_convert.sweep.sweep.measure_point", failing)
    ran = vmla("sweep", recipe, "-o", out)
    assert ran.code == 2
    assert "1 of the sweep's points failed" in ran.err
    monkeypatch.undo()
    assert vmla("sweep", recipe, "-o", out).code == 0
    assert vmla("sweep", recipe, "-o", out, "--set", "sweep.seeds=[0, 1]").code == 0
    rows = read_rows(out / "rows.jsonl")
    assert [r.seed for r in rows if r.metric == "velocity_error"] == [0, 1]
    assert not [row for row in rows if row.metric == "failed"]
    other = vmla("sweep", recipe, "-o", out, "--set", "evaluate.clips=5")
    assert refused(other)
    assert "exists already" in other.err


SWEEP_ALONE = """
[recipe]
name = "alone"
description = "one point"
[source]
checkpoint = "{teacher}"
[evaluate]
clips = 4
data = {{ frames = 6, seed = 1 }}
[convert]
calibration_clips = 4
data = {{ frames = 6 }}
[sweep]
alone = true
recover = false
products = ["mla"]
inits = ["random"]
sizes = [{{ cut = 0.8 }}]
"""


def test_a_finished_run_is_refused_and_kept(tiny: Path, finished: Path, vmla: Vmla) -> None:
    before = (finished / "rows.jsonl").read_bytes()
    assert refused(vmla("run", tiny, "-o", finished))
    assert (finished / "rows.jsonl").read_bytes() == before


@pytest.mark.parametrize("name", ["notes.txt", ".running"])
def test_a_folder_of_another_kind_is_refused_and_kept(
    name: str, tiny: Path, tmp_path: Path, vmla: Vmla
) -> None:
    (tmp_path / name).write_text("quickstart")
    assert refused(vmla("run", tiny, "-o", tmp_path))
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(name, "quickstart")]


def test_an_unfinished_run_goes_on_with_its_own_settings_only(
    tiny: Path, tmp_path: Path, vmla: Vmla
) -> None:
    out, recipe = tmp_path / "out", read_recipe(tiny)
    with pytest.raises(PowerCutError):
        run_recipe(recipe, out, PowerCut("converting", 1))
    left = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    ran = vmla("run", tiny, "-o", out, "--set", "recover.training.steps=4")
    assert refused(ran)
    assert "other settings" in ran.err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == left
    run_recipe(read_recipe(tiny), out, only=("convert",))
    assert {path.name for path in out.iterdir()} == {
        "converted-step0",
        "recipe.json",
        "rows.jsonl",
    }


def test_all_stages_are_known() -> None:
    assert STAGES == ("teacher", "convert", "recover", "sweep", "generate", "report")

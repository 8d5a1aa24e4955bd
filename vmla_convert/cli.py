"""`vmla`: parse, call a pipeline, print. Heavy imports happen inside the commands."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vmla_convert.config import (
    ConvertConfig,
    DataConfig,
    EvaluateConfig,
    RecoverConfig,
    SourceConfig,
    TrainingConfig,
)
from vmla_convert.console import out
from vmla_convert.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from vmla_convert.pipelines.inspect import Inspection
    from vmla_convert.pipelines.outlook import Outlook

app = typer.Typer(
    name="vmla",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    help="Give a pretrained causal video diffusion model a small latent KV cache.",
    epilog="New here? [bold]vmla demo[/bold] does the whole job on the model that ships with it.",
)

Checkpoint = Annotated[
    str,
    typer.Argument(
        help="A .pt or .safetensors file, a folder that holds one checkpoint, a Hub id owner/name, "
        "or 'demo'.",
        metavar="CKPT",
    ),
]
File = Annotated[
    str | None, typer.Option(help="Which file or folder of the Hub repository or the folder.")
]
Key = Annotated[
    str | None,
    typer.Option(help="Which state dict of a .pt that holds several: generator_ema, generator …"),
]
Model = Annotated[
    str | None,
    typer.Option(
        help="The known model that this is, such as self-forcing or longlive: brings chunk, "
        "window, sampler and licence, which no tensor tells. Hub ids are known by themselves."
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Override chunk_frames, latent_size, cache.*, sampler.*, codec, licence, base_model: "
        "--set cache.window_frames=12",
    ),
]
Loras = Annotated[
    list[str] | None,
    typer.Option("--lora", help="FILE or FILE:SCALE, merged before converting; repeat for more."),
]
OutFolder = Annotated[Path, typer.Option("--out", "-o", help="Folder to write; must not exist.")]
Teacher = Annotated[
    str, typer.Option(help="The dense checkpoint that the converted one came from, or 'demo'.")
]
Json = Annotated[bool, typer.Option("--json", help="Print data as JSON.")]
CacheScalars = Annotated[
    int | None,
    typer.Option(
        help="Numbers a token may cost per layer, divided among layers. Default: an eighth of the "
        "width plus a quarter of a head, 224 for Wan 1.3B (and one for a stored norm)."
    ),
]
Cut = Annotated[
    float | None, typer.Option(help="The same as a share of the dense cache to save: 0.92.")
]
KvLoraRank = Annotated[
    int | None,
    typer.Option(help="R, the content latent's width, the same for every layer, instead."),
]
Data = Annotated[
    str, typer.Option(help="Clips: 'demo', or a safetensors file with latents and context.")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a key of the recipe: --set recover.training.steps=50"),
]
RecipeFile = Annotated[
    str, typer.Argument(help="A TOML file, or a name from 'vmla recipes'.", metavar="RECIPE")
]


@app.command()
def inspect(
    checkpoint: Checkpoint,
    file: File = None,
    key: Key = None,
    model: Model = None,
    settings: Settings = None,
    loras: Loras = None,
    cache_scalars: CacheScalars = None,
    cut: Cut = None,
    kv_lora_rank: KvLoraRank = None,
    spectra: Annotated[
        bool, typer.Option(help="Also how low-rank each layer's weights are; reads them.")
    ] = False,
    json: Json = False,
) -> None:
    """Show what a checkpoint is, what its cache costs, and what a latent cache would cost."""
    from vmla_convert.pipelines.inspect import inspect_checkpoint

    out.json = json
    source = _source(checkpoint, file, key, model, settings, loras)
    sizes = ConvertConfig(cache_scalars=cache_scalars, cut=cut, kv_lora_rank=kv_lora_rank)
    with out.progress() as progress:
        inspection = inspect_checkpoint(source, sizes, progress, spectra)
    if json:
        out.data(inspection)
    else:
        _show_inspection(inspection)


@app.command()
def convert(
    checkpoint: Checkpoint,
    folder: OutFolder,
    file: File = None,
    key: Key = None,
    model: Model = None,
    settings: Settings = None,
    loras: Loras = None,
    cache_scalars: CacheScalars = None,
    cut: Cut = None,
    kv_lora_rank: KvLoraRank = None,
    qk_rope_head_dim: Annotated[
        int | None,
        typer.Option(help="Width of the shared rope key, even, with --positions decoupled."),
    ] = None,
    ranks: Annotated[
        str | None,
        typer.Option(
            help="How the numbers are divided: budget (by predicted error; the default where the "
            "init predicts it), energy, or uniform."
        ),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(help="Sizes of an earlier conversion: its folder or conversion.json."),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            help="calibrated (the default), spectral (the paper), random; or what a converter of "
            "language models would do: transmla, mha2mla, xecomla."
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="videomla: the paper's layer, init and shares; other options override."),
    ] = None,
    current_chunk: Annotated[
        str | None,
        typer.Option(help="dense: only the past is read from latents; latent: the chunk too."),
    ] = None,
    positions: Annotated[
        str | None,
        typer.Option(
            help="reconstructed: keys are rebuilt, then rotated; decoupled: a shared rope key."
        ),
    ] = None,
    latent: Annotated[
        str | None, typer.Option(help="joint: keys and values share the latent; or split.")
    ] = None,
    k_norm: Annotated[
        str | None,
        typer.Option(help="stored: one more number, exact; latent: predicted; or rebuilt."),
    ] = None,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibration/--no-calibration", help="Measure activations, or assume white inputs."
        ),
    ] = ConvertConfig.calibrate,
    data: Data = DataConfig.source,
    calibration_clips: Annotated[
        int, typer.Option(min=1, help="Clips that activations are measured on.")
    ] = ConvertConfig.calibration_clips,
    frames: Annotated[
        int, typer.Option(min=1, help="Latent frames of each, from its first on.")
    ] = DataConfig.frames,
    seed: Annotated[
        int, typer.Option(help="Of the calibration noise, or of the random init.")
    ] = ConvertConfig.seed,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Write all weights as bfloat16, float16 or float32. Default: kept ones as they "
            "are, new ones as float32."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="Go on with an interrupted conversion of the same settings.")
    ] = False,
    dry_run: Annotated[bool, typer.Option(help="Show what would be written, and stop.")] = False,
    json: Json = False,
) -> None:
    """Convert a dense checkpoint into a folder with a latent cache.

    The source is read block by block, so it need not fit in memory.
    """
    from vmla_convert.pipelines import convert as pipeline

    out.json = json
    layer = {
        "current_chunk": current_chunk,
        "positions": positions,
        "latent": latent,
        "k_norm": k_norm,
    }
    sizes = {
        "cache_scalars": cache_scalars,
        "cut": cut,
        "kv_lora_rank": kv_lora_rank,
        "qk_rope_head_dim": qk_rope_head_dim,
        "plan": pipeline.read_plan(plan) if plan else None,
    }
    config = pipeline.convert_config(
        preset,
        layer,
        sizes,
        {
            "init": init,
            "ranks": ranks,
            "calibrate": calibrate,
            "calibration_clips": calibration_clips,
            "data": {"source": data, "frames": frames},
            "seed": seed,
            "dtype": dtype,
        },
    )
    source = _source(checkpoint, file, key, model, settings, loras)
    if dry_run:
        from vmla_convert.pipelines.outlook import foresee

        _show_outlook(foresee(source, folder, config, resume))
        return
    try:
        with out.progress() as progress:
            done = pipeline.convert(source, folder, config, progress, resume)
    except KeyboardInterrupt:
        if pipeline.is_begun(folder):
            out.say("what is done is kept; to go on: the same command with --resume")
        raise
    out.data(
        {
            "numbers cached per token and layer": done.config.cache_scalars_per_token(),
            "cache cut": done.config.cache_cut(),
            "seconds": done.convert_seconds,
        }
    )
    out.path("wrote", folder)
    if not json:
        words = [
            "vmla",
            "recover",
            str(folder),
            "--teacher",
            checkpoint,
            "-o",
            f"{folder}-recovered",
        ]
        words += ["--data", data] if data != DataConfig.source else []
        out.say(f"next: {shlex.join(words)}")


@app.command()
def recover(
    converted: Annotated[Path, typer.Argument(help="Folder from 'vmla convert'.")],
    teacher: Teacher,
    folder: OutFolder,
    steps: Annotated[int, typer.Option(min=1, help="Distillation steps.")] = TrainingConfig.steps,
    layerwise_steps: Annotated[
        int, typer.Option(min=0, help="Steps of the layer-wise stage before.")
    ] = RecoverConfig.layerwise_steps,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = TrainingConfig.lr,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Clips per step, over all processes.")
    ] = TrainingConfig.batch_size,
    data: Data = DataConfig.source,
    seed: Annotated[
        int, typer.Option(help="Of the training noise and the order of the clips.")
    ] = TrainingConfig.seed,
    json: Json = False,
) -> None:
    """Recover quality with a short fine-tune against the dense model; resumes if interrupted."""
    from vmla_convert.pipelines.recover import recover as run

    out.json = json
    training = TrainingConfig(steps=steps, lr=lr, batch_size=batch_size, seed=seed)
    source = DataConfig(data)
    config = RecoverConfig(layerwise_steps, training=training, data=source)
    evaluation = EvaluateConfig(data=DataConfig(data, seed=1))
    with out.progress() as progress:
        rows = run(converted, teacher, folder, config, evaluation, progress)
    curve = [row for row in rows if row.metric == "velocity_error"]
    out.table("Recovery", ["step", "velocity_error"], [[row.step, row.value] for row in curve])
    out.path("wrote", folder)


@app.command()
def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[list[str], typer.Option(help="Repeat for several clips.")],
    video: Annotated[Path, typer.Option("--out", "-o", help="An .mp4 to write.")],
    frames: Annotated[int, typer.Option(min=1, help="Latent frames.")] = 20,
    seed: Annotated[int, typer.Option(help="Of all noise.")] = 0,
    compare: Annotated[
        str | None, typer.Option(help="A second checkpoint, shown beside from the same noise.")
    ] = None,
    json: Json = False,
) -> None:
    """Generate video from prompts, streaming through the cache; a contact sheet lands beside."""
    from vmla_convert.pipelines.generate import check_video_path, rollout, write_clips
    from vmla_convert.pipelines.load import compute_device, load

    out.json = json
    check_video_path(video)
    names = [checkpoint, *([compare] if compare else [])]
    labelled = zip(_labels(names), names, strict=True)
    models = {label: load(name, compute_device()) for label, name in labelled}
    with out.progress() as progress:
        clips = {
            label: rollout(model, prompt, frames, seed, progress, f"generating ({label})")
            for label, model in models.items()
        }
    for path in write_clips(video, clips, prompt):
        out.path("wrote", path)


@app.command("eval")
def evaluate(
    checkpoint: Checkpoint,
    teacher: Teacher,
    clips: Annotated[int, typer.Option(min=2, help="Held-out clips.")] = EvaluateConfig.clips,
    data: Data = DataConfig.source,
    json: Json = False,
) -> None:
    """Measure a converted checkpoint against its dense source on held-out clips."""
    from vmla_convert.pipelines.evaluate import HeldOut, dense_rows
    from vmla_convert.pipelines.load import as_teacher, compute_device, load
    from vmla_convert.pipelines.recover import check_pair
    from vmla_convert.pipelines.rows import cache_rows, error_rows

    out.json = json
    device = compute_device()
    model, dense = load(checkpoint, device), load(as_teacher(teacher, checkpoint), device)
    check_pair(model, dense)
    if model.config.mla is None:
        _check_is_teacher(checkpoint, teacher)
    held_out = HeldOut(dense, EvaluateConfig(clips, DataConfig(data, seed=1)))
    rows = dense_rows(dense, held_out)
    if model.config.mla is not None:
        rows += [
            *error_rows(held_out.measure(model), model.config, None),
            *cache_rows(model.config),
        ]
    cells = [[row.run, row.metric, row.value, row.unit] for row in rows]
    out.table("Held-out measurement", ["run", "metric", "value", "unit"], cells)


@app.command()
def sweep(
    recipe: RecipeFile,
    folder: Annotated[Path, typer.Option("--out", "-o", help="Folder for rows and report.")],
    overrides: Set = None,
) -> None:
    """Run the sweep of a recipe, and nothing else of it but the report."""
    _run(recipe, folder, overrides, only=("sweep", "report"))


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder with rows.jsonl.", metavar="DIR")],
    title: Annotated[str, typer.Option(help="Heading of the report.")] = "Conversion report",
    json: Json = False,
) -> None:
    """Write report.md, report.html and plots from the rows in a folder."""
    from vmla_convert.pipelines.report import write_report

    out.json = json
    for path in write_report(folder, title):
        out.path("wrote", path)


@app.command()
def run(
    recipe: RecipeFile,
    folder: Annotated[Path, typer.Option("--out", "-o", help="Folder for everything it writes.")],
    overrides: Set = None,
    dry_run: Annotated[bool, typer.Option(help="Check the recipe, show its stages, stop.")] = False,
) -> None:
    """Run a recipe from its first stage to its last; an interrupted run goes on where it was."""
    from vmla_convert.recipe import STAGES, check_recipe, read_recipe

    if dry_run:
        parsed = read_recipe(recipe, overrides)
        check_recipe(parsed, folder)
        out.data({"recipe": parsed.recipe.name, "stages": parsed.stages(), "would write": folder})
        return
    _run(recipe, folder, overrides, only=STAGES)


@app.command()
def demo(
    folder: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for everything it writes.")
    ] = Path("runs/quickstart"),
) -> None:
    """Do the whole job once, in minutes, on the small model that ships with the package."""
    run("quickstart", folder)


recipes_app = typer.Typer(invoke_without_command=True)
app.add_typer(recipes_app, name="recipes", help="List the recipes, or copy one to own.")


@recipes_app.callback()
def list_recipes(context: typer.Context) -> None:
    """List the recipes, or copy one to own."""
    from vmla_convert.recipe import available_recipes, read_recipe

    if context.invoked_subcommand is None:
        infos = [(name, read_recipe(path).recipe) for name, path in available_recipes().items()]
        rows = [[name, info.description] for name, info in infos]
        out.table("Recipes", ["name", "what it does"], rows)


@recipes_app.command()
def copy(
    name: Annotated[str, typer.Argument(help="A name from 'vmla recipes'.")],
    folder: Annotated[Path, typer.Option("--out", "-o", help="Folder to copy into.")] = Path(),
) -> None:
    """Copy a recipe to own and edit."""
    from vmla_convert.recipe import copy_recipe

    out.path("wrote", copy_recipe(name, folder))


def _source(
    checkpoint: str,
    file: str | None,
    key: str | None,
    model: str | None,
    settings: list[str] | None,
    loras: list[str] | None,
) -> SourceConfig:
    return SourceConfig(checkpoint, file, key, model, tuple(settings or ()), tuple(loras or ()))


def _run(recipe: str, folder: Path, overrides: list[str] | None, only: tuple[str, ...]) -> None:
    from vmla_convert.recipe import ROWS_NAME, read_recipe, run_recipe

    parsed = read_recipe(recipe, overrides)
    with out.progress() as progress:
        run_recipe(parsed, folder, progress, only)
    if (folder / ROWS_NAME).exists():
        _show_decision(folder / ROWS_NAME)
    for path in sorted(folder.iterdir()):
        out.path("wrote", path)


def _show_decision(rows_file: Path) -> None:
    from vmla_convert.pipelines.report import decisive_table
    from vmla_convert.results import read_rows

    header, *rows = decisive_table(read_rows(rows_file))
    if rows:
        out.table("What each setting costs and loses", header, rows)


def _show_outlook(outlook: Outlook) -> None:
    if out.json:
        out.data(outlook)
        return
    out.data(
        {
            "would write": outlook.out,
            "numbers cached per token and layer": outlook.cache_scalars_per_token,
            "cache cut": f"{outlook.cache_cut:.1%}",
            "working files beside it (bytes)": f"{outlook.working_bytes:,}",
            "about (seconds)": round(outlook.seconds),
        }
    )
    files = [[name, f"{nbytes:,}"] for name, nbytes in outlook.files.items()]
    out.table("Weights", ["file", "bytes"], [*files, ["together", f"{outlook.nbytes:,}"]])


def _show_inspection(inspection: Inspection) -> None:
    model, converted = inspection.model, inspection.converted
    geometry = model.geometry
    # A checkpoint with a licence has a config.json of ours, which tells the rest too.
    told = model.licence != "unknown"
    unnamed = "" if told else "none named; --model brings what tensors lack"
    known = {
        "known model": inspection.known_model or unnamed,
        "note": inspection.note,
    }
    out.data(
        {
            "checkpoint": inspection.path,
            "family": inspection.family,
            **({name: text for name, text in known.items() if text} if model.mla is None else {}),
            "parameters": f"{inspection.parameters:,}",
            "weights (bytes)": f"{inspection.nbytes:,} as {', '.join(inspection.dtypes)}",
            "layers, width, heads": f"{geometry.num_layers}, {geometry.dim}, {geometry.num_heads}",
            "feed-forward, channels": f"{geometry.ffn_dim}, {geometry.in_dim}",
            "latent size, tokens per frame": (
                f"{model.latent_size[0]} x {model.latent_size[1]}, {model.tokens_per_frame}"
            ),
            "chunk, window, sink (frames)": (
                f"{model.chunk_frames}, {model.cache.window_frames}, {model.cache.sink_frames}"
            ),
            "sampler steps, shift": (
                f"{', '.join(map(str, model.sampler.denoising_step_list))}; {model.sampler.shift:g}"
            ),
            "licence": model.licence,
            "base model": model.base_model,
        }
    )
    cached = [
        ["this checkpoint", model, inspection.window_cache_bytes],
        ["converted", converted, inspection.converted_window_cache_bytes],
    ]
    out.table(
        "KV cache",
        ["", "numbers per token and layer", "bytes per token, bf16", "full window (bytes)", "cut"],
        [
            [
                name,
                f"{c.cache_scalars_per_token():g}",
                f"{round(2 * c.cache_scalars_per_token() * geometry.num_layers):,}",
                f"{nbytes:,}",
                f"{c.cache_cut():.1%}",
            ]
            for name, c, nbytes in cached[: 1 if converted is model else 2]
        ],
    )
    for title, names in (
        ("Unknown tensors: convert will refuse them", inspection.unknown),
        ("Missing tensors: convert will refuse this checkpoint", inspection.missing),
    ):
        if names:
            out.table(title, ["name"], [[name] for name in names])
    if inspection.spectrum:
        layers = [
            [str(s.layer), str(s.effective_rank_99), f"{s.energy_at_rank:.1%}"]
            for s in inspection.spectrum
        ]
        rank = converted.mla.kv_lora_rank[0] if converted.mla else 0
        header = ["layer", f"99 %-energy rank of {geometry.dim}", f"energy at R = {rank}"]
        out.table("Joint key and value weights", header, layers)


def _labels(names: list[str]) -> list[str]:
    """A short name for each checkpoint; the whole path where short ones would be the same."""
    if len(set(names)) < len(names):
        raise ConfigError(
            f"{names[0]} cannot be compared with itself", "give another checkpoint to --compare"
        )
    short = [Path(name).name for name in names]
    return short if all(short) and len(set(short)) == len(short) else names


def _check_is_teacher(checkpoint: str, teacher: str) -> None:
    """Refuse a second dense model: errors against the teacher are told of converted ones only."""
    from vmla_convert.checkpoint.source import fingerprint
    from vmla_convert.pipelines.load import locate

    # By content, as one checkpoint may be given as a file and as its folder.
    one, other = (fingerprint(locate(name)[0]) for name in (checkpoint, teacher))
    if one != other:
        raise CheckpointError(
            f"{checkpoint} is dense, but not the teacher {teacher}",
            "give a converted CKPT; a dense CKPT must be the teacher itself",
        )

"""`vmla`: parse, call a pipeline, print. Heavy imports happen inside the commands."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vmla_convert.config import (
    CodecConfig,
    ConvertConfig,
    DataConfig,
    DMDConfig,
    EvaluateConfig,
    RecoverConfig,
    ReportConfig,
    RuntimeConfig,
    SourceConfig,
    TrainingConfig,
)
from vmla_convert.console import out
from vmla_convert.errors import CheckpointError, ConfigError
from vmla_convert.show import (
    show_decision,
    show_inspection,
    show_kept,
    show_outlook,
    show_push,
)
from vmla_convert.tables import from_dict, override

if TYPE_CHECKING:
    from torch import Tensor


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
Deployment = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Override the window or the sampler: --set cache.window_frames=12, "
        "--set cache.dense_recent_frames=2 (the newest past frames also dense, and exact).",
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        metavar="DIR",
        rich_help_panel="Wan's text encoder and VAE",
        help="Folder or Hub id in diffusers' layout that both come from. Default: "
        "what lies beside the checkpoint, else Wan's own.",
    ),
]
CacheDtype = Annotated[
    str,
    typer.Option(
        help="How a latent cache keeps latents: model (as the weights), int8 (half of bf16), or "
        "int4 (a quarter; more bits for what varies more)."
    ),
]
RopeDtype = Annotated[
    str, typer.Option(help="The same for rope keys (--positions decoupled): model or int8.")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a key of the recipe: --set recover.training.steps=50"),
]
DryRun = Annotated[bool, typer.Option(help="Check the recipe, show what it would do, and stop.")]
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
        show_inspection(inspection)


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
    qk_nope_head_dim: Annotated[
        int | None,
        typer.Option(
            help="Truncate the content part of every head, with --positions decoupled: 96 with a "
            "rope key of 32 makes heads of 128, which fused attention kernels are fastest at. The "
            "cache stays as it is."
        ),
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
    layout: Annotated[
        str,
        typer.Option(
            help="native, or diffusers: a pipeline's folder, with text encoder and VAE where the "
            "source has them."
        ),
    ] = "native",
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
        "qk_nope_head_dim": qk_nope_head_dim,
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

        show_outlook(foresee(source, folder, config, resume, layout))
        return
    try:
        with out.progress() as progress:
            done = pipeline.convert(source, folder, config, progress, resume, layout)
    except KeyboardInterrupt:
        if pipeline.is_begun(folder):
            out.say("what is done is kept; to go on: the same command with --resume")
        raise
    truncation = done.head_truncation_error
    out.data(
        {
            "numbers cached per token and layer": done.config.cache_scalars_per_token(),
            "cache cut": done.config.cache_cut(),
            **({"head truncation error": fmean(truncation)} if truncation else {}),
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
    steps: Annotated[
        int,
        typer.Option(min=0, help="Of velocity distillation on clips.", rich_help_panel="Stages"),
    ] = TrainingConfig.steps,
    layerwise_steps: Annotated[
        int,
        typer.Option(
            min=0, help="Of the layer-wise stage before, for each layer.", rich_help_panel="Stages"
        ),
    ] = RecoverConfig.layerwise_steps,
    on_policy_steps: Annotated[
        int,
        typer.Option(
            min=0,
            help="Of distillation on the student's own rollouts, after.",
            rich_help_panel="Stages",
        ),
    ] = RecoverConfig.on_policy_steps,
    dmd_steps: Annotated[
        int,
        typer.Option(
            min=0,
            help="Of distribution matching, last: a third model, for clusters.",
            rich_help_panel="Stages",
        ),
    ] = DMDConfig.steps,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Peak learning rate. Default: what a probe of the start finds.",
            rich_help_panel="What trains, and how",
        ),
    ] = TrainingConfig.lr,
    batch_size: Annotated[
        int,
        typer.Option(
            min=1,
            help="Clips per step, over all processes.",
            rich_help_panel="What trains, and how",
        ),
    ] = TrainingConfig.batch_size,
    accumulate: Annotated[
        int,
        typer.Option(
            min=1,
            help="Parts a process divides its clips into; less memory.",
            rich_help_panel="What trains, and how",
        ),
    ] = TrainingConfig.accumulate,
    data: Annotated[
        str,
        typer.Option(
            help="Clips: 'demo'; a safetensors file of latents and context, or a folder of them; "
            "'self', samples of the dense model's own; a video file, or a folder of them.",
            rich_help_panel="Clips",
        ),
    ] = DataConfig.source,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Prompts of 'self', one a line; or the one of all videos.",
            metavar="FILE",
            rich_help_panel="Clips",
        ),
    ] = None,
    clips: Annotated[
        int, typer.Option(min=2, help="How many 'self' samples, once.", rich_help_panel="Clips")
    ] = DataConfig.clips,
    frames: Annotated[
        int, typer.Option(min=1, help="Latent frames of a clip.", rich_help_panel="Clips")
    ] = (DataConfig.frames),
    base: Base = None,
    train: Annotated[
        str,
        typer.Option(
            help="new (what the conversion made), attention (queries and output too), all.",
            rich_help_panel="What trains, and how",
        ),
    ] = RecoverConfig.train,
    lora_rank: Annotated[
        int,
        typer.Option(
            min=0,
            help="Of adapters on what stays frozen; merged at the end.",
            rich_help_panel="What trains, and how",
        ),
    ] = RecoverConfig.lora_rank,
    levels: Annotated[
        str,
        typer.Option(
            help="Noise levels: of the sampler, of training, or both.", rich_help_panel="Stages"
        ),
    ] = RecoverConfig.levels,
    mixed_precision: Annotated[
        str,
        typer.Option(
            help="no, bf16 or fp16; what trains stays float32.",
            rich_help_panel="What trains, and how",
        ),
    ] = TrainingConfig.mixed_precision,
    tracker: Annotated[
        str,
        typer.Option(
            help="tensorboard (in OUT.logs), wandb or trackio.", rich_help_panel="Running"
        ),
    ] = TrainingConfig.tracker,
    offload: Annotated[
        bool,
        typer.Option(
            "--offload",
            help="Layer-wise stage with one block of the dense model in memory at a time; with "
            "--steps 0 the whole dense model is never there.",
            rich_help_panel="Running",
        ),
    ] = RecoverConfig.offload,
    shard: Annotated[
        bool,
        typer.Option(
            "--shard",
            help="Divide student and teacher over the processes: less memory for each.",
            rich_help_panel="Running",
        ),
    ] = RecoverConfig.shard,
    processes: Annotated[
        int | None,
        typer.Option(
            min=1, help="Refuse to run with another number of processes.", rich_help_panel="Running"
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            help="Of all noise in training.",
            rich_help_panel="What trains, and how",
        ),
    ] = TrainingConfig.seed,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Any other setting: --set training.ema=0.99, training.patience=4, "
            "training.gradient_checkpointing=true, flow_weight=0.1, rest_lr=0.05.",
            rich_help_panel="What trains, and how",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            help="Check everything, say what would train and be written, stop.",
            rich_help_panel="Running",
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Recover quality with a short fine-tune against the dense model; resumes if interrupted.

    On several GPUs: torchrun --standalone --nproc_per_node 8 -m vmla_convert recover …
    """
    from vmla_convert.pipelines.load import read_provenance
    from vmla_convert.pipelines.prepare import read_prompts
    from vmla_convert.pipelines.processes import processes as started
    from vmla_convert.pipelines.recovery import plan_recovery
    from vmla_convert.pipelines.recovery import recover as run

    out.json = json
    table: dict[str, Any] = {
        "layerwise_steps": layerwise_steps,
        "on_policy_steps": on_policy_steps,
        "train": train,
        "lora_rank": lora_rank,
        "levels": levels,
        "offload": offload,
        "shard": shard,
        "dmd": {"steps": dmd_steps},
        "training": {
            "steps": steps,
            "lr": lr,
            "batch_size": batch_size,
            "accumulate": accumulate,
            "mixed_precision": mixed_precision,
            "tracker": tracker,
            "seed": seed,
        },
        "data": {
            "source": data,
            "frames": frames,
            "clips": clips,
            "prompts": list(read_prompts(prompts)) if prompts else [],
            "base": base,
        },
    }
    for change in settings or ():
        override(table, change)
    config = from_dict(RecoverConfig, table, "recover")
    if dry_run:
        planned = plan_recovery(converted, teacher, folder, config, processes)
        if started().is_main_process:
            out.data(planned)
        return
    evaluation = EvaluateConfig(data=replace(config.data, seed=1))
    with out.progress() as progress:
        rows = run(converted, teacher, folder, config, evaluation, progress, processes)
    if not started().is_main_process:
        return
    curve = [row for row in rows if row.metric == "velocity_error"]
    out.table("Recovery", ["step", "velocity_error"], [[row.step, row.value] for row in curve])
    show_kept(read_provenance(folder)["recovered"])
    out.path("wrote", folder)


@app.command()
def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[list[str], typer.Option(help="Repeat for several clips.")],
    video: Annotated[Path, typer.Option("--out", "-o", help="An .mp4 to write.")],
    seconds: Annotated[
        float | None,
        typer.Option(help="How long; a Wan model makes 4 latent frames a second, the demo 8."),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(min=1, help="The same in latent frames; 20 if neither is given."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of all noise.")] = 0,
    compare: Annotated[
        str | None, typer.Option(help="A second checkpoint, shown beside from the same noise.")
    ] = None,
    settings: Deployment = None,
    switch: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt-at",
            "--switch",
            metavar="TIME:PROMPT",
            help="Another prompt from then on, for all clips: '20s:a dog', or '80:a dog' in latent "
            "frames; repeat for more.",
        ),
    ] = None,
    keep_sink: Annotated[
        bool, typer.Option(help="At a switch, keep what the sink holds of the first prompt.")
    ] = True,
    prefix: Annotated[
        Path | None,
        typer.Option(
            "--prefix",
            "--image",
            metavar="FILE",
            help="An image or a video that the clip begins with, and goes on from.",
        ),
    ] = None,
    base: Base = None,
    vae_tiling: Annotated[
        bool,
        typer.Option(
            "--vae-tiling",
            help="Decode frames in overlapping tiles: less memory.",
            rich_help_panel="Wan's text encoder and VAE",
        ),
    ] = CodecConfig.vae_tiling,
    cpu_offload: Annotated[
        bool,
        typer.Option(
            "--cpu-offload",
            help="Keep both in host memory, and on the GPU only while they work.",
            rich_help_panel="Wan's text encoder and VAE",
        ),
    ] = CodecConfig.cpu_offload,
    cache_dtype: CacheDtype = RuntimeConfig.cache_dtype,
    rope_dtype: RopeDtype = RuntimeConfig.rope_dtype,
    backend: Annotated[
        str,
        typer.Option(
            help="How latents are read: materialised (keys and values rebuilt), absorbed (with "
            "decoupled positions), or auto, the faster one; it may be another on another machine."
        ),
    ] = RuntimeConfig.backend,
    tile_mib: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Most MiB of rebuilt keys and values at a time. Default: 64, on a GPU 1024.",
        ),
    ] = RuntimeConfig.tile_mib,
    offload: Annotated[
        bool, typer.Option("--offload", help="Keep the cache in host memory.")
    ] = RuntimeConfig.offload,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of weights and cache: float32 or bfloat16, the default on a GPU."),
    ] = None,
    compiled: Annotated[
        bool,
        typer.Option("--compile", help="Compile all but the self-attention; for long rollouts."),
    ] = False,
    json: Json = False,
) -> None:
    """Generate video from prompts, written as it comes; its first frame lands beside as a PNG.

    With --compare, clips are kept until both are done, and a contact sheet lands there instead.
    """
    import torch

    from vmla_convert.layers.dit import check_runtime
    from vmla_convert.pipelines.codecs import (
        check_prompts,
        latent_frames_per_second,
        open_codec,
    )
    from vmla_convert.pipelines.generate import (
        check_video_path,
        clip_frames,
        parse_switch,
        read_prefix,
        rollout,
        track_chunks,
        write_clips,
        write_film,
    )
    from vmla_convert.pipelines.generate import generate as run
    from vmla_convert.pipelines.load import build, compute_device, open_named

    out.json = json
    check_video_path(video)
    if dtype not in (None, "float32", "bfloat16"):
        raise ConfigError(f"no dtype '{dtype}'", "use float32 or bfloat16")
    options = {
        "backend": backend,
        "tile_mib": tile_mib,
        "cache_dtype": cache_dtype,
        "rope_dtype": rope_dtype,
        "offload": offload,
    }
    runtime = from_dict(RuntimeConfig, options)
    names = [checkpoint, *([compare] if compare else [])]
    opened = {
        label: open_named(SourceConfig(name, overrides=tuple(settings or ())))
        for label, name in zip(_labels(names), names, strict=True)
    }
    # Beside a dense model that is compared, the options are the latent cache's.
    ways = {
        label: runtime if source.config.mla or not compare else RuntimeConfig(offload=offload)
        for label, source in opened.items()
    }
    for label, source in opened.items():
        check_runtime(source.config, ways[label])
    first = next(iter(opened.values()))
    rate = latent_frames_per_second(first.config)
    length = clip_frames(seconds, frames, rate)
    switches = [parse_switch(text, len(prompt), keep_sink, rate) for text in switch or ()]
    check_prompts(first.config, (*prompt, *(p for s in switches for p in s.prompts)))
    device = compute_device()
    precision = getattr(torch, dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    how = CodecConfig(base, vae_tiling, cpu_offload)
    codec = open_codec(first.config, how, first.source.path, device, precision)
    given = read_prefix(prefix, codec, first.config.latent_size, length) if prefix else None
    clips: dict[str, Tensor] = {}
    sizes: dict[str, int] = {}
    written: list[Path] = []
    with out.progress() as progress:
        for label, source in opened.items():
            model, way = build(source, device, precision), ways[label]
            if compiled:
                model.compile_blocks()
            sizes[f"cache of {label} (bytes)"] = model.cache_bytes(len(prompt), way)
            task = f"generating ({label})"
            if compare:
                clips[label] = rollout(
                    model, prompt, length, seed, progress, task, way, switches, codec, given
                )
            else:
                chunks = run(model, prompt, length, seed, way, switches, codec, given)
                chunks = track_chunks(progress, chunks, task, model, length, given)
                written = write_film(video, chunks, codec, progress)
    out.data(sizes)
    for path in written or write_clips(video, clips, prompt, codec):
        out.path("wrote", path)


@app.command("eval")
def evaluate(
    checkpoint: Checkpoint,
    teacher: Teacher,
    clips: Annotated[int, typer.Option(min=2, help="Held-out clips.")] = EvaluateConfig.clips,
    data: Data = DataConfig.source,
    settings: Deployment = None,
    cache_dtype: CacheDtype = RuntimeConfig.cache_dtype,
    rope_dtype: RopeDtype = RuntimeConfig.rope_dtype,
    json: Json = False,
) -> None:
    """Measure a converted checkpoint against its dense source on held-out clips.

    With a window or a cache dtype of its own, clips are streamed, through caches of that window.
    """
    from vmla_convert.layers.dit import check_runtime
    from vmla_convert.pipelines.evaluate import HeldOut, dense_rows
    from vmla_convert.pipelines.load import as_teacher, compute_device, load
    from vmla_convert.pipelines.recovery import check_pair
    from vmla_convert.pipelines.rows import cache_rows, error_rows

    out.json = json
    device = compute_device()
    dense = load(as_teacher(teacher, checkpoint), device)
    model = load(SourceConfig(checkpoint, overrides=tuple(settings or ())), device)
    check_pair(model, dense)
    runtime = from_dict(RuntimeConfig, {"cache_dtype": cache_dtype, "rope_dtype": rope_dtype})
    check_runtime(model.config, runtime)
    if model.config.mla is None:
        _check_is_teacher(checkpoint, teacher)
    streamed = bool(settings) or runtime != RuntimeConfig()
    dense.config = replace(dense.config, cache=model.config.cache)
    held_out = HeldOut(dense, EvaluateConfig(clips, DataConfig(data, seed=1)), streamed)
    rows = dense_rows(dense, held_out)
    if model.config.mla is not None:
        kept = runtime if streamed else None
        errors = held_out.measure(model, kept)
        rows += error_rows(errors, model.config, None, runtime=kept)
        rows += cache_rows(model.config, runtime=kept)
    cells = [[row.run, row.metric, row.value, row.unit] for row in rows]
    out.table("Held-out measurement", ["run", "metric", "value", "unit"], cells)


@app.command()
def export(
    checkpoint: Checkpoint,
    folder: OutFolder,
    layout: Annotated[
        str | None,
        typer.Option(
            help="native (Wan's names, safetensors), diffusers (a pipeline's folder) or "
            "self_forcing (one model.pt). Default: as the family of the checkpoint has it."
        ),
    ] = None,
    state: Annotated[
        str | None,
        typer.Option(
            help="With self_forcing, the state dict to write: generator_ema (the default), "
            "generator, model …"
        ),
    ] = None,
    file: File = None,
    key: Key = None,
    model: Model = None,
    settings: Settings = None,
    loras: Loras = None,
    json: Json = False,
) -> None:
    """Write a checkpoint, dense or converted, under the names that other programs read."""
    from vmla_convert.pipelines.export import export as run

    out.json = json
    source = _source(checkpoint, file, key, model, settings, loras)
    with out.progress() as progress:
        written = run(source, folder, layout, state, progress)
    out.path("wrote", written)


@app.command()
def sweep(
    recipe: RecipeFile,
    folder: Annotated[Path, typer.Option("--out", "-o", help="Folder for rows and report.")],
    overrides: Set = None,
    dry_run: DryRun = False,
) -> None:
    """Run the sweep of a recipe, and nothing else of it but the report.

    Points are shared by processes: torchrun --nproc_per_node N -m vmla_convert sweep RECIPE -o DIR
    """
    _run(recipe, folder, overrides, ("sweep", "report"), dry_run)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder with rows.jsonl.", metavar="DIR")],
    title: Annotated[str, typer.Option(help="Heading of the report.")] = ReportConfig.title,
    loss_bound: Annotated[
        float,
        typer.Option(
            min=0,
            help="Flow loss that the recommended setting may have above the dense model's, as a "
            "share of it.",
        ),
    ] = ReportConfig.loss_bound,
    json: Json = False,
) -> None:
    """Write report.md, report.html and plots from the rows in a folder."""
    from vmla_convert.pipelines.report import write_report

    out.json = json
    for path in write_report(folder, title, loss_bound):
        out.path("wrote", path)


@app.command()
def push(
    folder: Annotated[
        Path, typer.Argument(help="Folder from 'vmla convert' or 'vmla recover'.", metavar="OUT")
    ],
    repo: Annotated[str, typer.Argument(help="Where to: owner/name.", metavar="OWNER/NAME")],
    private: Annotated[
        bool, typer.Option("--private", help="Make it so that only its owner sees it.")
    ] = False,
    tag: Annotated[
        str | None, typer.Option(help="Name this state of it: --tag v1, for OWNER/NAME@v1.")
    ] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    dry_run: Annotated[
        bool, typer.Option(help="Show what would go up, and how large it is; stop.")
    ] = False,
    json: Json = False,
) -> None:
    """Publish a conversion on the Hugging Face Hub, with a card that says what it is.

    Interrupted, run it again: what went up is not sent twice. Log in with: hf auth login
    """
    from vmla_convert.pipelines import publish

    out.json = json
    show_push(publish.push(folder, repo, private, tag, message, dry_run), dry_run)


@app.command()
def run(
    recipe: RecipeFile,
    folder: Annotated[Path, typer.Option("--out", "-o", help="Folder for everything it writes.")],
    overrides: Set = None,
    dry_run: DryRun = False,
) -> None:
    """Run a recipe from its first stage to its last; an interrupted run goes on where it was."""
    from vmla_convert.recipe import STAGES

    _run(recipe, folder, overrides, STAGES, dry_run)


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


def _run(
    recipe: str,
    folder: Path,
    overrides: list[str] | None,
    only: tuple[str, ...],
    dry_run: bool,
) -> None:
    from vmla_convert.recipe import ROWS_NAME, check_recipe, count_points, read_recipe, run_recipe

    parsed = read_recipe(recipe, overrides)
    if dry_run:
        check_recipe(parsed, folder, only)
        stages = [stage for stage in parsed.stages() if stage in only]
        points = {"points": count_points(parsed)} if "sweep" in stages else {}
        told = {"recipe": parsed.recipe.name, "stages": stages, **points, "would write": folder}
        out.data(told)
        return
    with out.progress() as progress:
        leads = run_recipe(parsed, folder, progress, only)
    if not leads:
        return
    if (folder / ROWS_NAME).exists():
        show_decision(folder / ROWS_NAME)
    for path in sorted(folder.iterdir()):
        out.path("wrote", path)


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

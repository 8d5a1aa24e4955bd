"""Checkpoints: what one is, what it would cost converted, and the same weights written anew."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from vmla_convert.cli.options import (
    MLA,
    SIZE,
    BaseModel,
    BytesPerToken,
    Checkpoint,
    Cut,
    Data,
    File,
    Json,
    Key,
    KvLoraRank,
    Loras,
    Model,
    OutFolder,
    Settings,
    asked_size,
)
from vmla_convert.config import ConvertConfig, DataConfig, SourceConfig
from vmla_convert.console import out
from vmla_convert.show import show_inspection, show_planned_output
from vmla_convert.tables import to_dict


def inspect(
    checkpoint: Checkpoint,
    file: File = None,
    key: Key = None,
    model: Model = None,
    settings: Settings = None,
    loras: Loras = None,
    bytes_per_token: BytesPerToken = None,
    cut: Cut = None,
    spectra: Annotated[
        bool, typer.Option(help="Also how low-rank each layer's weights are; reads them.")
    ] = False,
    json: Json = False,
) -> None:
    """Show what a checkpoint is, what its cache costs, and what a codec's cache would cost."""
    from vmla_convert.fitting.inspect import inspect_checkpoint

    out.json = json
    source = _source(checkpoint, file, key, model, settings, loras)
    sizes = ConvertConfig(size=asked_size(bytes_per_token, cut))
    with out.progress() as progress:
        inspection = inspect_checkpoint(source, sizes, progress, spectra)
    if json:
        out.data(inspection)
    else:
        show_inspection(inspection)


def convert(
    checkpoint: Checkpoint,
    folder: OutFolder,
    file: File = None,
    key: Key = None,
    model: Model = None,
    settings: Settings = None,
    loras: Loras = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="videomla: a whole checkpoint with the paper's MLA layers instead of a codec."
        ),
    ] = None,
    bytes_per_token: BytesPerToken = None,
    cut: Cut = None,
    channels: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Channels per layer in the codec's file, which bound its largest size. Default: "
            "a sixth of the model's width, at least 256, at most the width.",
            rich_help_panel=SIZE,
        ),
    ] = None,
    kv_lora_rank: KvLoraRank = None,
    qk_rope_head_dim: Annotated[
        int | None, typer.Option(help="Width of the shared rope key, even.", rich_help_panel=MLA)
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            help="Sizes of an earlier conversion: its folder or conversion.json.",
            rich_help_panel=MLA,
        ),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            help="spectral (the paper), calibrated (which divides the numbers among layers by "
            "predicted error), or random.",
            rich_help_panel=MLA,
        ),
    ] = None,
    latent: Annotated[
        str | None,
        typer.Option(
            help="joint: keys and values share the latent; or split.", rich_help_panel=MLA
        ),
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
            help="Write weights as bfloat16, float16 or float32. Default: bfloat16 for a codec; "
            "for MLA kept ones as they are, new ones as float32."
        ),
    ] = None,
    layout: Annotated[
        str,
        typer.Option(
            help="native, or diffusers: a pipeline's folder, with text encoder and VAE where the "
            "source has them.",
            rich_help_panel=MLA,
        ),
    ] = "native",
    resume: Annotated[
        bool, typer.Option(help="Go on with an interrupted conversion of the same settings.")
    ] = False,
    dry_run: Annotated[bool, typer.Option(help="Show what would be written, and stop.")] = False,
    json: Json = False,
) -> None:
    """Make a cache codec for a dense checkpoint, or with --preset a checkpoint with MLA layers.

    The checkpoint is read block by block and never written. One codec serves every size.

    Example:
        vmla convert model.pt -o kv
    """
    from vmla_convert.fitting import convert as pipeline

    out.json = json
    sizes = {
        "bytes_per_token": bytes_per_token,
        "cut": cut,
        "kv_lora_rank": kv_lora_rank,
        "qk_rope_head_dim": qk_rope_head_dim,
        "plan": to_dict(pipeline.read_plan(plan)) if plan else None,
    }
    given = {name: value for name, value in sizes.items() if value is not None}
    config = pipeline.convert_config(
        preset,
        {
            "size": given or None,
            "channels": channels,
            "init": init,
            "latent": latent,
            "calibrate": calibrate,
            "calibration_clips": calibration_clips,
            "data": {"source": data, "frames": frames},
            "seed": seed,
            "dtype": dtype,
        },
    )
    source = _source(checkpoint, file, key, model, settings, loras)
    if dry_run:
        from vmla_convert.fitting.plan import plan_output

        show_planned_output(plan_output(source, folder, config, resume, layout))
        return
    try:
        with out.progress() as progress:
            done = pipeline.convert(source, folder, config, progress, resume, layout)
    except KeyboardInterrupt:
        if pipeline.can_resume(folder):
            out.say("what is done is kept; to go on: the same command with --resume")
        raise
    out.data(
        {
            "bytes cached per token and layer": done.config.cache_bytes_per_token(),
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
            *(["--teacher", checkpoint] if config.product == "mla" else []),
            "-o",
            f"{folder}-recovered",
        ]
        words += ["--data", data] if data != DataConfig.source else []
        out.say(f"next: {shlex.join(words)}")


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
    base_model: BaseModel = None,
    json: Json = False,
) -> None:
    """Write a checkpoint under the names that other programs read; a codec with its base model.

    Example:
        vmla export kv -o whole --layout self_forcing
    """
    from vmla_convert.loading.export import export as run

    out.json = json
    source = replace(_source(checkpoint, file, key, model, settings, loras), base_model=base_model)
    with out.progress() as progress:
        written = run(source, folder, layout, state, progress)
    out.path("wrote", written)


def _source(
    checkpoint: str,
    file: str | None,
    key: str | None,
    model: str | None,
    settings: list[str] | None,
    loras: list[str] | None,
) -> SourceConfig:
    return SourceConfig(checkpoint, file, key, model, tuple(settings or ()), tuple(loras or ()))

"""Write a checkpoint under the names of the repositories that it goes to."""

from __future__ import annotations

from pathlib import Path

from vmla_convert.checkpoint.families import OpenCheckpoint
from vmla_convert.checkpoint.layouts import DIFFUSERS, NATIVE, WAN, Layout
from vmla_convert.checkpoint.output import refuse_taken
from vmla_convert.checkpoint.torch_pickle import STATE_KEYS
from vmla_convert.checkpoint.writer import CheckpointWriter, write_pickle
from vmla_convert.errors import ConfigError, did_you_mean
from vmla_convert.loading.load import Source, check_whole, open_named, read_provenance
from vmla_convert.loading.metadata_files import Files, converted_files, dense_files, parts_to_copy
from vmla_convert.progress import Progress, Silent

SELF_FORCING = "self_forcing"
LAYOUTS = ("native", "diffusers", SELF_FORCING)
"""By the name that `--layout` takes."""

# Those of every other family are Wan's own.
_LAYOUT_OF_FAMILY = {
    SELF_FORCING: SELF_FORCING,
    "diffusers": "diffusers",
    "skyreels_diffusers": "diffusers",
}
_PREFIX = "model."


def export(
    source: Source,
    out: Path,
    layout: str | None = None,
    key: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write a dense or converted checkpoint into a folder of another layout, bit by bit the same.

    The folder opens again with `load`, and appears whole or not at all; what a kill left of an
    export is discarded by the next one to the same place. A dense one is what its family's programs
    read, with what they keep elsewhere as a table `vmla` in config.json; a converted one has new
    tensors, and our own config.json beside them.

    Args:
        source: Checkpoint file or folder, `demo`, or a Hub id; with settings and LoRAs if need be.
        out: Folder to write; where it is taken or lacks space, no weights are read.
        layout: `native`, Wan's names, safetensors; `diffusers`, a pipeline's folder, with text
            encoder and VAE where the source has them; `self_forcing`, one `model.pt` in its
            trainer's wrappers, held in memory while it is written. None for the family's own.
        key: State dict of the `.pt`; None for the first that readers look for.
        progress: Where to draw.

    Returns:
        The file or folder that programs are given.

    Raises:
        CheckpointError: The source cannot be read, or is of no known family.
        ConfigError: The layout is unknown, or has no place for a key.
        OutputError: `out` is taken, or cannot be written.
    """
    refuse_taken(out)  # before anything is fetched
    progress = progress or Silent()
    checkpoint = open_named(source, progress)
    chosen = layout or _LAYOUT_OF_FAMILY.get(checkpoint.config.family, "native")
    _check_words(chosen, key)
    form = _form(chosen, converted=not checkpoint.config.is_dense)
    components = parts_to_copy(checkpoint.model_path, form, progress)
    if checkpoint.config.is_dense:
        files = dense_files(checkpoint.config, form, components)
    else:
        check_whole(checkpoint)
        record = read_provenance(source)
        files = converted_files(checkpoint.config, record, form, components)
    if chosen == SELF_FORCING:
        return _write_wrapped(checkpoint, out, key or STATE_KEYS[0], files, progress)
    with CheckpointWriter(out, checkpoint.specs(), layout=form, copies=components) as writer:
        for name in progress.track(checkpoint.names, "writing"):
            writer.add(name, checkpoint.read(name))
        writer.write_files(files)
    return out


def _check_words(layout: str, key: str | None) -> None:
    if layout not in LAYOUTS:
        raise ConfigError(f"unknown layout '{layout}'", did_you_mean(layout, LAYOUTS))
    if key is not None and layout != SELF_FORCING:
        raise ConfigError(
            f"layout '{layout}' has no state dicts to choose a key for",
            f"leave it out, or use --layout {SELF_FORCING}",
        )
    if key is not None and key not in STATE_KEYS:
        raise ConfigError(f"no reader looks for the key '{key}'", did_you_mean(key, STATE_KEYS))


def _form(layout: str, converted: bool) -> Layout:
    if layout == "diffusers":
        return DIFFUSERS
    return NATIVE if converted or layout == SELF_FORCING else WAN


def _write_wrapped(
    checkpoint: OpenCheckpoint, out: Path, key: str, files: Files, progress: Progress
) -> Path:
    names = progress.track(checkpoint.names, "reading")
    nbytes = sum(spec.nbytes for spec in checkpoint.specs().values())
    tensors = ((f"{_PREFIX}{name}", checkpoint.read(name)) for name in names)
    return write_pickle(out, nbytes, tensors, key, files)

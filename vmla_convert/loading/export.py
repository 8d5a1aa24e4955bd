"""Export a checkpoint to another layout, with the file and tensor names of that layout."""

from __future__ import annotations

from pathlib import Path

from vmla_convert.checkpoint.families import OpenCheckpoint
from vmla_convert.checkpoint.geometry import block_of
from vmla_convert.checkpoint.layouts import DIFFUSERS, NATIVE, WAN, Layout
from vmla_convert.checkpoint.torch_pickle import STATE_KEYS
from vmla_convert.checkpoint.writer import CheckpointWriter, write_pickle
from vmla_convert.errors import ConfigError, did_you_mean
from vmla_convert.loading.load import Source, check_whole, open_named, read_provenance
from vmla_convert.loading.metadata_files import Files, converted_files, dense_files, parts_to_copy
from vmla_convert.progress import Progress, Silent
from vmla_convert.storage.lock import sole_writer
from vmla_convert.storage.output import refuse_taken

SELF_FORCING = "self_forcing"
EXPORT_LAYOUTS = ("native", "diffusers", SELF_FORCING)
"""Names for `--layout`."""

# Other families use Wan's own layout.
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
    """Write a dense or converted checkpoint into a folder of another layout, with equal tensors.

    The folder appears complete or not at all, and opens again with `load`. A dense export opens in
    the programs of its family; settings that these keep elsewhere are a table `vmla` in
    config.json. A converted export has our own config.json.

    Args:
        source: Checkpoint file or folder, `demo`, or a Hub id, with settings and LoRAs.
        out: Folder to write. No weights are read when the folder is taken or the disk is full.
        layout: `native`: Wan's names, safetensors. `diffusers`: a pipeline's folder, with text
            encoder and VAE where the source has them. `self_forcing`: one `model.pt`, which is held
            in memory. None takes the layout of the family.
        key: State dict of the `.pt`; None takes the first that readers look for.
        progress: Draws the bars.

    Returns:
        The file or folder to give to other programs.

    Raises:
        CheckpointError: The source cannot be read, or is of no known family.
        ConfigError: The layout is unknown, or has no place for a key.
        OutputError: `out` is taken, cannot be written, or is written by another process.
    """
    with sole_writer(out):
        return _export(source, out, layout, key, progress or Silent())


def _export(
    source: Source, out: Path, layout: str | None, key: str | None, progress: Progress
) -> Path:
    refuse_taken(out)  # before a download
    checkpoint = open_named(source, progress)
    chosen = layout or _LAYOUT_OF_FAMILY.get(checkpoint.config.family, "native")
    _check_options(chosen, key)
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
        for name in progress.track(sorted(checkpoint.names, key=block_of), "writing"):
            writer.add(name, checkpoint.read(name))
        writer.write_files(files)
    return out


def _check_options(layout: str, key: str | None) -> None:
    if layout not in EXPORT_LAYOUTS:
        raise ConfigError(f"unknown layout '{layout}'", did_you_mean(layout, EXPORT_LAYOUTS))
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
    nbytes = sum(spec.nbytes for spec in checkpoint.specs().values())
    names = progress.track(checkpoint.names, "reading")
    tensors = ((f"{_PREFIX}{name}", checkpoint.read(name)) for name in names)
    return write_pickle(out, nbytes, tensors, key, files)

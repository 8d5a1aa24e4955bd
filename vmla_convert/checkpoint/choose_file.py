"""Choose the checkpoint among the files of a folder or of a Hub repository, by one rule."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import PurePosixPath

from vmla_convert.errors import CheckpointError

INDEX_SUFFIX = ".safetensors.index.json"
PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
CODEC_NAME = "codec.safetensors"
"""Weights of a cache codec. A codec comes first, as its base model may be in the same folder."""

# In one folder, an index comes before single files, and safetensors before pickles.
_KINDS = ((INDEX_SUFFIX,), (".safetensors",), PICKLE_SUFFIXES)
ENDINGS = tuple(suffix for kind in _KINDS for suffix in kind)
_SHARD = re.compile(r"-\d{5}-of-(?!00001)\d{5}\.")
# Other parts of a video pipeline, as Wan, its successors and diffusers name them.
_NO_TRANSFORMER = re.compile(
    r"(^|/)(vae|(text|image)_encoder(_\d+)?|tokenizer(_\d+)?|scheduler)/"
    r"|(^|[/_.-])(vae|u?mt5|t5|clip|lora|optimizer)([_.-])",
    re.IGNORECASE,
)
_TRANSFORMERS = {"transformer", "transformer_2"}
_EXPERTS = {"high_noise_model", "low_noise_model"} | _TRANSFORMERS


def choose_file(
    files: Iterable[str], where: str, name_it: Callable[[str], str], note: str = ""
) -> str | None:
    """The one checkpoint among some files, or None when there is none.

    Args:
        files: Relative paths, with slashes.
        where: The folder or repository, for messages.
        name_it: The words that tell a user how to name one of the files.
        note: The end of the hint.

    Raises:
        CheckpointError: Several files may be meant.
    """
    found = candidates(files)
    folders = {PurePosixPath(file).parts[0] for file in found}
    if folders and folders <= _EXPERTS and folders != {"transformer"}:
        experts = sorted(folders)
        raise CheckpointError(
            f"{where} holds no weights but the experts of a mixture: {', '.join(experts)}",
            f"convert each expert by itself: {', or '.join(map(name_it, experts))}{note}",
        )
    if len(found) > 1:
        more = f" and {len(found) - 8} more" if len(found) > 8 else ""
        raise CheckpointError(
            f"{where} holds {len(found)} checkpoints: {', '.join(found[:8])}{more}",
            f"{name_it(found[0])}, or another of them{note}",
        )
    return found[0] if found else None


def candidates(files: Iterable[str]) -> list[str]:
    """All files that may be the checkpoint of a video model, from the first place that has any.

    The places, in order: a codec at the root, a pipeline's transformer, the root, any folder. A
    file whose name says LoRA, VAE or text encoder counts only at a root that holds nothing else.
    """
    whole = [file for file in sorted(files) if not _SHARD.search(file)]
    found = _first_kinds(file for file in whole if not _NO_TRANSFORMER.search(file))
    root = [file for file in found if "/" not in file]
    places = (
        [file for file in root if file == CODEC_NAME],
        [file for file in found if in_pipeline(file)],
        root,
        found,
        _first_kinds(file for file in whole if "/" not in file),
    )
    return next(filter(None, places), [])


def is_main(file: str) -> bool:
    """Whether a repository's id alone may mean this file, or a shard of it.

    Such a file is at the root or in a pipeline's transformer folder. Which one `choose_file`
    chooses depends on the other files.
    """
    weights = file.endswith(ENDINGS) and not _NO_TRANSFORMER.search(file)
    return weights and ("/" not in file or in_pipeline(file))


def in_pipeline(file: str) -> bool:
    """Whether a file is in the transformer folder of a diffusers pipeline."""
    return file.partition("/")[0] in _TRANSFORMERS


def _first_kinds(files: Iterable[str]) -> list[str]:
    """The files of the first kind in each folder."""
    folders: dict[PurePosixPath, list[str]] = {}
    for file in files:
        folders.setdefault(PurePosixPath(file).parent, []).append(file)
    found: list[str] = []
    for inside in folders.values():
        kinds = ([file for file in inside if file.endswith(kind)] for kind in _KINDS)
        found += next(filter(None, kinds), [])
    return found

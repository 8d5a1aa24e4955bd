"""Find the dense model that a conversion came from, and check that the two belong together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from vmla_convert.checkpoint.settings import DEPLOYMENT
from vmla_convert.checkpoint.source import fingerprint
from vmla_convert.config import ModelConfig, SourceConfig
from vmla_convert.errors import CheckpointError
from vmla_convert.loading.load import (
    Source,
    base_of,
    is_codec,
    is_conversion,
    locate,
    read_provenance,
)
from vmla_convert.tables import from_dict


def as_teacher(teacher: Source, converted: Source) -> SourceConfig:
    """A dense checkpoint with the file, key, settings and LoRAs of its conversion.

    Args:
        teacher: The dense checkpoint. A `SourceConfig` with more than a name and a file is returned
            unchanged.
        converted: The conversion of that checkpoint.

    Raises:
        CheckpointError: One of the two cannot be found, or the record is damaged.
    """
    given = teacher if isinstance(teacher, SourceConfig) else SourceConfig(str(teacher))
    if given != SourceConfig(given.checkpoint, given.file):
        return given
    origin = read_provenance(converted).get("source", {})
    asked = from_dict(SourceConfig, origin.get("asked", {}))
    known = replace(asked, checkpoint=given.checkpoint, model=origin.get("known_model"))
    if given.file is not None or Path(given.checkpoint).is_file():
        known = replace(known, file=given.file)
    path, _ = locate(known)
    if fingerprint(path) == origin.get("sha256"):
        return known
    # Other bytes may be the same model in another form: with other keys, and LoRAs merged.
    return replace(known, key=None, loras=())


def teacher_of(converted: Source, teacher: Source | None = None) -> SourceConfig:
    """The dense model that a conversion is compared with and learns from.

    Args:
        converted: A codec or an MLA checkpoint.
        teacher: The dense checkpoint; by default a codec's base model.

    Raises:
        CheckpointError: One of the two cannot be found, or an MLA checkpoint has no teacher.
    """
    path, how = locate(converted)
    if not is_codec(path):
        if teacher is None:
            raise CheckpointError(
                f"{how.checkpoint} does not hold the dense model that it came from",
                "name it: --teacher CKPT",
            )
        return as_teacher(teacher, converted)
    if teacher is None:
        return base_of(path, SourceConfig())
    given = teacher if isinstance(teacher, SourceConfig) else SourceConfig(str(teacher))
    if given != SourceConfig(given.checkpoint, given.file):
        return given
    base = base_of(path, SourceConfig(base_model=given.checkpoint))
    return base if given.file is None else replace(base, file=given.file)


def check_pair(student: ModelConfig, teacher: ModelConfig) -> None:
    """Check that a teacher can be the student's dense source.

    Raises:
        CheckpointError: The teacher is converted, or has another geometry.
    """
    if not teacher.is_dense:
        raise CheckpointError(
            "the teacher is a converted checkpoint", "give the dense one: --teacher CKPT"
        )
    if teacher.geometry != student.geometry:
        raise CheckpointError(
            "the teacher's geometry is not that of the converted checkpoint",
            "give the dense checkpoint that it was converted from: --teacher CKPT",
        )


def check_same(checkpoint: SourceConfig, teacher: SourceConfig) -> None:
    """Refuse a second dense model: only conversions are measured against the teacher.

    Raises:
        CheckpointError: The two checkpoints have different bytes.
    """
    one, other = (fingerprint(locate(source)[0]) for source in (checkpoint, teacher))
    if one != other:
        raise CheckpointError(
            f"{checkpoint.checkpoint} is dense, but not the teacher {teacher.checkpoint}",
            "give a converted CKPT; a dense CKPT must be the teacher itself",
        )


def sources_to_compare(first: SourceConfig, other: str) -> list[SourceConfig]:
    """Two checkpoints with the options that fit each of them.

    LoRAs and settings of cache and sampler apply to both. `file`, `key`, `model` and all further
    settings apply to the first dense checkpoint. `base_model` applies to conversions only.

    Args:
        first: The first checkpoint with all options.
        other: Name of the second one.
    """
    names = [first.checkpoint, other]
    # `is_conversion` may list a Hub repository; skip it where there are no options to assign.
    plain = first == SourceConfig(first.checkpoint)
    converted = [not plain and is_conversion(name) for name in names]
    owner = converted.index(False) if False in converted else 0
    shared = {name: table for name, table in first.overrides.items() if name in DEPLOYMENT}
    apart = SourceConfig(overrides=shared, loras=first.loras, verify=first.verify)
    return [
        replace(
            first if place == owner else apart,
            checkpoint=name,
            base_model=first.base_model if converted[place] else None,
        )
        for place, name in enumerate(names)
    ]

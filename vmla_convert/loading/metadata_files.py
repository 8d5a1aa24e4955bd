"""The files of a checkpoint folder beside the weights, for each layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vmla_convert.checkpoint.layouts import DIFFUSERS, NATIVE, PIPELINE_NAME, Layout
from vmla_convert.checkpoint.settings import converted_config, read_config
from vmla_convert.config import ModelConfig
from vmla_convert.errors import ConfigError, did_you_mean
from vmla_convert.loading.card import CARD_NAME, model_card
from vmla_convert.loading.load import CONVERSION_NAME
from vmla_convert.maths.flow import TRAIN_TIMESTEPS
from vmla_convert.media.components import PARTS, Part, parts_beside, repository_with_parts
from vmla_convert.progress import Progress
from vmla_convert.tables import to_dict

LAYOUTS = {"native": NATIVE, "diffusers": DIFFUSERS}
"""Layouts of a converted folder, by the name that `--layout` takes."""

Files = dict[str, str | dict[str, Any]]
"""Text, or a JSON table, by path in the folder."""

# diffusers records a class of another package by its module.
_TRANSFORMER = ("vmla_convert.interop.transformer", "VMLATransformer")
_DENSE_TRANSFORMER = ("diffusers", "WanTransformer3DModel")
_SCHEDULER = "FlowMatchEulerDiscreteScheduler"
# The classes of Wan's own pipelines, for components without an index beside them.
_CLASSES: dict[Part, tuple[str, str]] = {
    "vae": ("diffusers", "AutoencoderKLWan"),
    "text_encoder": ("transformers", "UMT5EncoderModel"),
    "tokenizer": ("transformers", "T5TokenizerFast"),
}
_WAN_TEXT_LEN = 512


def named_layout(name: str) -> Layout:
    """The layout of a converted folder by name.

    Raises:
        ConfigError: There is none of this name.
    """
    if name not in LAYOUTS:
        raise ConfigError(f"unknown layout '{name}'", did_you_mean(name, LAYOUTS))
    return LAYOUTS[name]


def converted_files(
    config: ModelConfig, record: Mapping[str, Any], layout: Layout, components: Mapping[str, Path]
) -> Files:
    """Config, record (as conversion.json) and card of a converted checkpoint.

    In diffusers' layout they come with the pipeline's index and scheduler; `components` are those
    that `parts_to_copy` found.
    """
    is_pipeline = layout is DIFFUSERS
    files: Files = {
        layout.place("config.json"): (transformer_config if is_pipeline else converted_config)(
            config
        ),
        layout.place(CONVERSION_NAME): dict(record),
        CARD_NAME: model_card(config, record, parts=components if is_pipeline else None),
    }
    if is_pipeline:
        files |= _pipeline_files("VMLAPipeline", _TRANSFORMER, config, components)
    return files


def dense_files(config: ModelConfig, layout: Layout, components: Mapping[str, Path]) -> Files:
    """The config of a dense checkpoint for programs of its family, and a pipeline's other files."""
    if layout is not DIFFUSERS:
        return {layout.place("config.json"): wan_config(config)}
    table = {layout.place("config.json"): _wan_transformer_config(config)}
    return table | _pipeline_files("WanPipeline", _DENSE_TRANSFORMER, config, components)


def read_index(root: Path) -> dict[str, Any]:
    """The index of a pipeline, which names the class of each part; empty where there is none.

    Raises:
        CheckpointError: The index is damaged.
    """
    return read_config(root / PIPELINE_NAME)


def transformer_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a `VMLATransformer`, which `vmla_convert.load` reads too."""
    return {"_class_name": _TRANSFORMER[1], **converted_config(config)}


def wan_config(config: ModelConfig) -> dict[str, Any]:
    """Wan's own config.json, with a table `vmla` for settings that Wan keeps elsewhere."""
    geometry = to_dict(config.geometry)
    del geometry["patch_size"], geometry["text_dim"]
    return {"_class_name": "WanModel", "model_type": "t2v", **geometry, "vmla": _settings(config)}


def parts_to_copy(path: Path, layout: Layout, progress: Progress | None = None) -> dict[str, Path]:
    """Text encoder, tokenizer and VAE beside a checkpoint, when a pipeline is written.

    Components on the Hub are not copied, as that would download gigabytes unasked. A note then
    says where they stay.

    Raises:
        CheckpointError: There is no checkpoint, or its repository cannot be read.
    """
    beside = parts_beside(path)
    if layout is DIFFUSERS and beside:
        return {part: place for part, place in beside.items()}
    if progress is not None:
        here = next((place.parent for place in beside.values()), None)
        if stay := here or repository_with_parts(path):
            progress.note(
                "text encoder and VAE are not copied; generate finds them by "
                f"--set media.base={stay}"
            )
    return {}


def _wan_transformer_config(config: ModelConfig) -> dict[str, Any]:
    geometry = config.geometry
    table = {
        "_class_name": _DENSE_TRANSFORMER[1],
        "attention_head_dim": geometry.head_dim,
        "cross_attn_norm": True,
        "eps": geometry.eps,
        "ffn_dim": geometry.ffn_dim,
        "freq_dim": geometry.freq_dim,
        "in_channels": geometry.in_dim,
        "num_attention_heads": geometry.num_heads,
        "num_layers": geometry.num_layers,
        "out_channels": geometry.out_dim,
        "patch_size": list(geometry.patch_size),
        "qk_norm": "rms_norm_across_heads",
        "text_dim": geometry.text_dim,
        "vmla": _settings(config),
    }
    # diffusers has no such key, and warns about unknown keys.
    more = {} if geometry.text_len == _WAN_TEXT_LEN else {"text_len": geometry.text_len}
    return table | more


def _settings(config: ModelConfig) -> dict[str, Any]:
    """The settings that names and shapes of tensors do not show."""
    settings = to_dict(config)
    del settings["geometry"], settings["family"]
    return settings


def _pipeline_files(
    pipeline: str,
    transformer: tuple[str, str],
    config: ModelConfig,
    components: Mapping[str, Path],
) -> Files:
    index: dict[str, Any] = {
        "_class_name": pipeline,
        "scheduler": ["diffusers", _SCHEDULER],
        "transformer": list(transformer),
    }
    known = read_index(next(iter(components.values())).parent) if components else {}
    for part in PARTS:
        # diffusers writes [None, None] for a component that is not in the folder.
        named = known.get(part, list(_CLASSES[part]))
        index[part] = named if part in components else [None, None]
    scheduler = {
        "_class_name": _SCHEDULER,
        "num_train_timesteps": int(TRAIN_TIMESTEPS),
        "shift": config.sampler.shift,
    }
    return {PIPELINE_NAME: index, "scheduler/scheduler_config.json": scheduler}

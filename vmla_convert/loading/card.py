"""What a converted folder says about itself: facts of its config and its record, nothing else."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from vmla_convert.checkpoint.hub import is_repo
from vmla_convert.checkpoint.known import KNOWN
from vmla_convert.checkpoint.licences import OTHER, UNKNOWN
from vmla_convert.config import DENSE_ITEMSIZE, CodecConfig, MLAConfig, ModelConfig
from vmla_convert.errors import ConfigError
from vmla_convert.media.base import latent_frames_per_second
from vmla_convert.media.components import PARTS
from vmla_convert.tables import override, to_dict

CARD_NAME = "README.md"
STRIPS = ("strip.png", "compare.png")
"""Pictures that a card shows, where one lies in the folder; the first of them."""

# What the strings of a record are, by the key that they, or lists of them, are under; whatever is
# not named here is taken for a path as soon as it has a folder in it, also the keys themselves.
_PROMPTS, _LICENCES, _OVERRIDES = "prompts", "licence", "overrides"
_REPOS = ("checkpoint", "base_model", "repo")
_REPOS_OR_FOLDERS = ("base", "_name_or_path", "name_or_path")

# How a path begins that cannot be taken for anything else: not so "MIT/X11".
_ROOTED = re.compile(r"~|\.{0,2}[/\\]|[A-Za-z]:[/\\]|file:")

_SEAL = "<!-- made by vmla-convert: "
_SECONDS = (5, 30, 60)
_CLIP_SECONDS = 5


def model_card(
    config: ModelConfig,
    record: Mapping[str, Any],
    repo: str | None = None,
    strip: str | None = None,
    parts: Collection[str] | None = None,
) -> str:
    """README.md of a converted checkpoint: licence and base model are the source's, never ours.

    Args:
        config: Of the converted model.
        record: What made it, as conversion.json has it.
        repo: Where it will be on the Hub, if it will.
        strip: A picture beside the card.
        parts: Of a folder in diffusers' layout, which of text encoder, tokenizer and VAE it holds;
            None in other layouts.
    """
    record = without_folders(record)
    licence, base_model = config.licence, config.base_model
    config = replace(
        config,
        licence=_public(_LICENCES, licence),
        base_model=base_model if is_repo(base_model) else UNKNOWN,
    )
    origin = record.get("source", {})
    sections = [
        f"---\n{_metadata(config, record).to_yaml()}\n---",
        f"# {origin.get('name', 'A checkpoint')}, converted to a latent KV cache",
        f"{_made(config)}: each layer caches {config.cache_bytes_per_token():.4g} bytes per token "
        f"instead of {DENSE_ITEMSIZE * config.geometry.dense_cache_scalars} "
        f"({config.cache_cut():.1%} less).",
        f"![frames of a rollout]({strip})" if strip else "",
        f"## Licence\n\n{_licence(config, origin)}",
        f"## How to use it\n\n{_usage(repo or '.', config, parts)}",
        f"## What the cache takes\n\n{_cache(config)}",
        f"## What the conversion loses\n\n{_losses(record)}",
        f"## How it was made\n\n{_settings(config, origin)}\n\n{_recipe(record)}",
    ]
    text = "\n\n".join(filter(None, sections)) + "\n\n"
    return f"{text}{_SEAL}{_digest(text)} -->\n"


def is_untouched(card: str) -> bool:
    """Whether a card is as `model_card` made it, so that another may take its place."""
    text, seal, digest = card.rpartition(_SEAL)
    return bool(seal) and digest == f"{_digest(text)} -->\n"


def without_folders(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record as others may see it: of what lay in somebody's folders the names alone.

    What a string is, its key says. Ids of the Hub stay whole where one is meant: a source's
    `checkpoint`, a `base_model` and a base's `repo` are nothing else, and a `file` beside a
    `checkpoint` or `repo` is a path in that repository. A `base` may be a folder too, which records
    have as an absolute path (`data.recorded`), and so may a `_name_or_path`: what looks like an id
    passes for one unless it is there as a path.
    """
    public: dict[str, Any] = {}
    for key, value in record.items():
        in_repo = key == "file" and is_repo(str(record.get("checkpoint") or record.get("repo")))
        public[_free(_name(key), public)] = value if in_repo else _public(key, value)
    return public


def _public(key: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return without_folders(value)
    if isinstance(value, list | tuple):
        return [_public(key, entry) for entry in value]
    if not isinstance(value, str) or key == _PROMPTS:
        return value
    if key == _LICENCES:
        return _name(value) if _ROOTED.match(value) else value
    if key == _OVERRIDES:
        return _public_override(value)
    if key in _REPOS and is_repo(value):
        return value
    if key in _REPOS_OR_FOLDERS and is_repo(value) and not Path(value).exists():
        return value
    return _name(value)


def _public_override(text: str) -> str:
    """A `key=value` by what its key says of the value; as it was typed, where that can stay."""
    typed: dict[str, Any] = {}
    try:
        override(typed, text)
    except ConfigError:
        return _name(text)
    path = text.partition("=")[0]
    *_, key = path.split(".")
    value: Any = typed
    for part in path.split("."):
        value = value[part]
    public = _public(key, value)
    if public == value:
        return text
    return f"{path}={public if isinstance(public, str) else json.dumps(public)}"


def _name(path: str) -> str:
    """The last part of a path of any system, with the scale that may follow a LoRA's."""
    return re.split(r"[/\\]+", path.rstrip("/\\"))[-1]


def _free(key: str, taken: Mapping[str, Any]) -> str:
    """Nothing is lost where two keys are alike without their folders."""
    return key if key not in taken else _free(f"{key}'", taken)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _made(config: ModelConfig) -> str:
    """What a conversion is, in words."""
    if config.codec is not None:
        return "A cache codec made by vmla-convert, which goes with its base model"
    return (
        "Converted by vmla-convert to a cache like that of "
        "[VideoMLA](https://arxiv.org/abs/2605.30351)"
    )


def _metadata(config: ModelConfig, record: Mapping[str, Any]) -> ModelCardData:
    origin = record.get("source", {})
    name, link = _terms(config, origin) if config.licence == OTHER else (None, None)
    base_model = config.base_model if config.base_model != UNKNOWN else None
    if config.codec is not None:
        repo = str(record.get("base", {}).get("repo"))
        base_model = repo if is_repo(repo) else base_model
    # A whole checkpoint is no adapter of what it was trained from.
    is_adapter = config.codec is not None and base_model is not None
    return ModelCardData(
        license=config.licence,
        license_name=name,
        license_link=link,
        base_model=base_model,
        base_model_relation="adapter" if is_adapter else None,
        library_name="vmla-convert",
        pipeline_tag="text-to-video",
        tags=["vmla", "latent-kv-cache", "causal-video-diffusion"],
    )


def _terms(config: ModelConfig, origin: Mapping[str, Any]) -> tuple[str, str | None]:
    """Name of a special licence and where it stands, if that is known."""
    known = KNOWN.get(origin.get("known_model") or "")
    if known and known.terms:
        return known.terms
    page = f"https://huggingface.co/{config.base_model}"
    return UNKNOWN, page if config.base_model != UNKNOWN else None


def _licence(config: ModelConfig, origin: Mapping[str, Any]) -> str:
    """That of the weights, in words."""
    base = config.base_model
    source = f"[{base}](https://huggingface.co/{base})" if base != UNKNOWN else "its source"
    licence = config.licence
    if licence == UNKNOWN:
        told = (
            "**The licence of these weights is unknown**: that of what they were made of is not "
            "known to the program that made them. Do not take that for a permission."
        )
    elif licence == OTHER:
        name, link = _terms(config, origin)
        terms = f"[{name}]({link})" if link else f"{name}"
        told = f"These weights are bound by the terms of {source}: {terms}. Read them before use."
    else:
        told = f"These weights keep the licence of {source}: {licence}."
    loras = [
        f"The licence of the merged LoRA {lora['name']} is {lora.get('licence', UNKNOWN)}."
        for lora in origin.get("loras", ())
    ]
    changed = "They are changed: see how they were made, below."
    return " ".join([told, *loras, changed])


def _usage(place: str, config: ModelConfig, parts: Collection[str] | None) -> str:
    prompt = "7" if config.media == "demo" else "a red kite over the sea"
    frames = round(60 * latent_frames_per_second(config))
    extras = "video" if config.media == "demo" else "wan,video"
    imports, media, text = "", "", ""
    # A model alone does not know where it came from, and so not that its components lie there too.
    if set(PARTS) <= set(parts or ()):
        imports = "\nfrom vmla_convert.config import MediaConfig"
        media = f'\nmedia = vmla.open_media(model.config, MediaConfig("{place}"))'
        text = ", text=media"
    told = f"""```sh
pip install "vmla-convert[{extras}]"
vmla generate "{place}" --prompt "{prompt}" -o clip.mp4
```

```python
import vmla_convert as vmla{imports}

model = vmla.load("{place}"){media}
for chunk in vmla.generate(model, prompt="{prompt}", frames={frames}{text}):
    ...  # clean latents, chunk by chunk
```"""
    return told if parts is None else f"{told}\n\n{_pipeline_usage(place, prompt, config)}"


def _pipeline_usage(place: str, prompt: str, config: ModelConfig) -> str:
    """The same with diffusers."""
    rate = config.frames_per_second
    frames = _CLIP_SECONDS * rate + (config.media != "demo")  # Wan's first latent frame is one
    return f"""With diffusers (`pip install "vmla-convert[wan]"`):

```python
from vmla_convert import VMLAPipeline

pipe = VMLAPipeline.from_pretrained("{place}")  # then .to("cuda"), where there is one
frames = pipe("{prompt}", num_frames={frames}, output_type="pil").frames[0]
frames[0].save("clip.gif", save_all=True, append_images=frames[1:], duration={round(1000 / rate)})
```"""


def _cache(config: ModelConfig) -> str:
    """Bytes by length, dense and converted."""
    dense, rate = replace(config, mla=None, codec=None), latent_frames_per_second(config)
    window = config.cache.window_frames
    lengths = [(f"{seconds} s", round(seconds * rate)) for seconds in _SECONDS]
    rows = [
        [label, frames, f"{dense.cache_bytes(frames):,}", f"{config.cache_bytes(frames):,}"]
        for label, frames in [*lengths, ("**its window**", window)]
    ]
    return (
        _table(["video kept", "latent frames", "dense (bytes)", "converted (bytes)"], rows)
        + "\n\nOne video, two bytes a number. When it streams, it keeps its window and no more, "
        "however long the video."
    )


def _losses(record: Mapping[str, Any]) -> str:
    """Errors of the whole model, as far as they were measured."""
    told: list[str] = []
    measured = record.get("recovered", {}).get("errors", {})
    if measured:
        dense = measured["dense_flow_loss"]
        rows = [
            [name, point["step"], f"{point['velocity_error']:.3g}", _above(point, dense)]
            for name, point in (
                ("before training", measured["first"]),
                ("recovered", measured["last"]),
            )
        ]
        told.append(
            _table(["", "step", "velocity error", "flow loss above the dense model's"], rows)
        )
        told.append(
            f"On {measured['clips']} held-out clips ({measured['source']}), of "
            "the chunks that read the cache; the weights that did best on them were kept. The "
            "velocity error is squared, relative to the dense model's velocity."
        )
    elif "recovered" in record:
        told.append("No error of the whole model was measured, neither before nor after recovery.")
    else:
        told.append(
            "It was not trained after its conversion, and no error of the whole model was "
            "measured: see `vmla eval`."
        )
    return "\n\n".join(told)


def _above(point: Mapping[str, Any], dense: float) -> str:
    return f"{point['flow_loss'] / dense - 1:+.2%}"


def _settings(config: ModelConfig, origin: Mapping[str, Any]) -> str:
    merged = [f"{lora['name']} (scale {lora['scale']:g})" for lora in origin.get("loras", ())]
    sha256 = origin.get("sha256")
    rows = [
        *(_mla_settings(config.mla) if config.mla else []),
        *(_codec_settings(config.codec) if config.codec else []),
        ["source", origin.get("name", UNKNOWN)],
        *([["SHA-256 of its weights", f"`{sha256}`"]] if sha256 else []),
        ["its family", config.family],
        ["its base model", config.base_model],
        ["licence of the whole", config.licence],
        ["LoRAs merged before", ", ".join(merged) or "none"],
    ]
    return _table(["setting", "value"], rows)


def _mla_settings(mla: MLAConfig) -> list[list[Any]]:
    return [
        ["init", mla.init],
        ["latent", mla.latent],
        ["kv_lora_rank, layer by layer", _listed(mla.kv_lora_rank)],
        ["qk_rope_head_dim", _listed([2 * len(pairs) for pairs in mla.rope_pairs])],
    ]


def _codec_settings(codec: CodecConfig) -> list[list[Any]]:
    return [
        ["channels per layer, the largest size", codec.rank],
        ["default size", ", ".join(f"{k} {v:g}" for k, v in to_dict(codec.size).items())],
        ["fitted to activations", "yes" if codec.calibrated else "no"],
    ]


def _recipe(record: Mapping[str, Any]) -> str:
    """All settings; those that say how long it took are in the record only."""
    kept = ("convert", "recover", "versions")
    settings = {name: record[name] for name in kept if name in record}
    if asked := record.get("source", {}).get("asked"):
        settings = {"source": asked, **settings}
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    return f"```json\n{text}\n```\n\nThe whole record is in `conversion.json`."


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _listed(values: Sequence[int]) -> str:
    """One number where all layers share it."""
    return ", ".join(map(str, values[:1] if len(set(values)) == 1 else values))

"""Write the model card of a converted folder, from its config and its record."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from huggingface_hub import ModelCardData

from vmla_convert.checkpoint.hub import is_repo
from vmla_convert.checkpoint.known import KNOWN
from vmla_convert.checkpoint.licences import OTHER, UNKNOWN
from vmla_convert.config import DENSE_ITEMSIZE, ModelConfig
from vmla_convert.loading.public_record import public_value, without_folders
from vmla_convert.media.base import latent_frames_per_second
from vmla_convert.media.components import PARTS
from vmla_convert.tables import to_dict

CARD_NAME = "README.md"
STRIPS = ("strip.png", "compare.png")
"""Pictures for the card; the first one that exists in the folder is shown."""

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
    """The README.md of a converted checkpoint, with the licence and base model of its source.

    Args:
        config: Config of the converted model.
        record: Content of conversion.json.
        repo: Hub repository of the checkpoint.
        strip: File name of a picture beside the card.
        parts: Components (text encoder, tokenizer, VAE) in a folder of diffusers' layout; None in
            other layouts.
    """
    record = without_folders(record)
    base_model = config.base_model if is_repo(config.base_model) else UNKNOWN
    licence = public_value("licence", config.licence)
    config = replace(config, licence=licence, base_model=base_model)
    source = record.get("source", {})
    sections = [
        f"---\n{_metadata(config, record).to_yaml()}\n---",
        f"# {_title(config, str(source.get('name', 'a checkpoint')))}",
        _summary(config),
        f"![frames of a rollout]({strip})" if strip else "",
        f"## Licence\n\n{_licence(config, source)}",
        f"## How to use it\n\n{_usage(repo or '.', config, parts)}",
        f"## Cache size\n\n{_cache(config)}",
        f"## Error\n\n{_errors(record)}",
        f"## How it was made\n\n{_settings(config, source)}\n\n{_recipe(record)}",
    ]
    text = "\n\n".join(filter(None, sections)) + "\n\n"
    return f"{text}{_SEAL}{_digest(text)} -->\n"


def is_untouched(card: str) -> bool:
    """Whether a card is unchanged since `model_card` wrote it, and may be replaced."""
    text, seal, digest = card.rpartition(_SEAL)
    return bool(seal) and digest == f"{_digest(text)} -->\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _title(config: ModelConfig, source: str) -> str:
    return f"Cache codec for {source}" if config.codec else f"{source} with a latent KV cache"


def _summary(config: ModelConfig) -> str:
    size = (
        f"{config.cache_bytes_per_token():.4g} bytes per token and layer instead of "
        f"{DENSE_ITEMSIZE * config.geometry.dense_cache_scalars} ({config.cache_cut():.1%} less)"
    )
    if config.codec is not None:
        return (
            f"A cache codec, made by vmla-convert. With it, the base model caches {size}. The "
            "codec is used together with its base model, which stays unchanged."
        )
    return (
        "A video model with the attention layers of "
        f"[VideoMLA](https://arxiv.org/abs/2605.30351), made by vmla-convert. It caches {size}."
    )


def _metadata(config: ModelConfig, record: Mapping[str, Any]) -> ModelCardData:
    name, link = None, None
    if config.licence == OTHER:
        name, link = _terms(config, record.get("source", {}))
    base_model = config.base_model if config.base_model != UNKNOWN else None
    if config.codec is not None:
        repo = str(record.get("base", {}).get("repo"))
        base_model = repo if is_repo(repo) else base_model
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


def _terms(config: ModelConfig, source: Mapping[str, Any]) -> tuple[str, str | None]:
    """Name and address of the terms of a licence that is `other`."""
    known = KNOWN.get(source.get("known_model") or "")
    if known and known.terms:
        return known.terms
    page = f"https://huggingface.co/{config.base_model}"
    return UNKNOWN, page if config.base_model != UNKNOWN else None


def _licence(config: ModelConfig, source: Mapping[str, Any]) -> str:
    base, licence = config.base_model, config.licence
    origin = f"[{base}](https://huggingface.co/{base})" if base != UNKNOWN else "the source model"
    if licence == UNKNOWN:
        text = (
            "**The licence of these weights is unknown**, because the licence of the source is not "
            "known to the program. This does not mean that you may use them."
        )
    elif licence == OTHER:
        name, link = _terms(config, source)
        terms = f"[{name}]({link})" if link else name
        text = f"These weights are under the terms of {origin}: {terms}. Read them before use."
    else:
        text = f"These weights are under the licence of {origin}: {licence}."
    loras = [
        f"The licence of the merged LoRA {lora['name']} is {lora.get('licence', UNKNOWN)}."
        for lora in source.get("loras", ())
    ]
    changed = "They were made from the original weights: see “How it was made”."
    return " ".join([text, changed, *loras])


def _usage(place: str, config: ModelConfig, parts: Collection[str] | None) -> str:
    demo = config.media == "demo"
    prompt, extras = ("7", "video") if demo else ("a red kite over the sea", "wan,video")
    frames = round(60 * latent_frames_per_second(config))
    imports, media, text = "", "", ""
    # `vmla.generate` gets a model alone, which does not name the folder of its components.
    if set(PARTS) <= set(parts or ()):
        imports = "\nfrom vmla_convert.config import MediaConfig"
        media = f'\nmedia = vmla.open_media(model.config, MediaConfig("{place}"))'
        text = ", text=media"
    usage = f"""```sh
pip install "vmla-convert[{extras}]"
vmla generate "{place}" --prompt "{prompt}" -o clip.mp4
```

```python
import vmla_convert as vmla{imports}

model = vmla.load("{place}"){media}
for chunk in vmla.generate(model, prompt="{prompt}", frames={frames}{text}):
    ...  # clean latents, chunk by chunk
```"""
    if parts is None:
        return usage
    rate = config.frames_per_second
    frames = _CLIP_SECONDS * rate + (not demo)  # Wan's first latent frame is one pixel frame
    return f"""{usage}

With diffusers (`pip install "vmla-convert[wan]"`):

```python
from vmla_convert import VMLAPipeline

pipe = VMLAPipeline.from_pretrained("{place}")  # then .to("cuda") on a GPU
frames = pipe("{prompt}", num_frames={frames}, output_type="pil").frames[0]
frames[0].save("clip.gif", save_all=True, append_images=frames[1:], duration={round(1000 / rate)})
```

`DiffusionPipeline.from_pretrained(…, trust_remote_code=True)` makes the same pipeline of a
repository on the Hub."""


def _cache(config: ModelConfig) -> str:
    dense, rate = replace(config, mla=None, codec=None), latent_frames_per_second(config)
    lengths = [(f"{seconds} s", round(seconds * rate)) for seconds in _SECONDS]
    rows = [
        [label, frames, f"{dense.cache_bytes(frames):,}", f"{config.cache_bytes(frames):,}"]
        for label, frames in [*lengths, ("**window**", config.cache.window_frames)]
    ]
    header = ["cached video", "latent frames", "dense cache (bytes)", "this cache (bytes)"]
    return (
        f"{_table(header, rows)}\n\nSizes are for one video, with two bytes per number. A stream "
        "never caches more than its window, whatever the length of the video."
    )


def _errors(record: Mapping[str, Any]) -> str:
    measured = record.get("recovered", {}).get("errors", {})
    if measured:
        dense = measured["dense_flow_loss"]
        points = (("before recovery", measured["first"]), ("after recovery", measured["last"]))
        rows = [
            [
                name,
                point["step"],
                f"{point['velocity_error']:.3g}",
                f"{point['flow_loss'] / dense - 1:+.2%}",
            ]
            for name, point in points
        ]
        header = ["", "step", "velocity error", "flow loss relative to the dense model"]
        return (
            f"{_table(header, rows)}\n\nMeasured on {measured['clips']} held-out clips "
            f"({measured['source']}), on the chunks that attend to cached frames. The weights are "
            "those of the best step. The velocity error is squared, and relative to the dense "
            "model's velocity."
        )
    if "recovered" in record:
        return "The error of the whole model was not measured, neither before nor after recovery."
    return (
        "This checkpoint was not trained after the conversion, and the error of the whole model "
        "was not measured. Measure it with `vmla eval`."
    )


def _settings(config: ModelConfig, source: Mapping[str, Any]) -> str:
    rows: list[list[Any]] = []
    if mla := config.mla:
        rows += [
            ["init", mla.init],
            ["latent", mla.latent],
            ["kv_lora_rank, layer by layer", _listed(mla.kv_lora_rank)],
            ["qk_rope_head_dim", _listed([2 * len(pairs) for pairs in mla.rope_pairs])],
        ]
    if codec := config.codec:
        rows += [
            ["latent numbers per layer, largest size", codec.rank],
            ["default size", ", ".join(f"{k} {v:g}" for k, v in to_dict(codec.size).items())],
            ["fitted to activations", "yes" if codec.calibrated else "no"],
        ]
    merged = [f"{lora['name']} (scale {lora['scale']:g})" for lora in source.get("loras", ())]
    rows.append(["source", source.get("name", UNKNOWN)])
    if sha256 := source.get("sha256"):
        rows.append(["SHA-256 of the source", f"`{sha256}`"])
    rows += [
        ["family", config.family],
        ["base model", config.base_model],
        ["licence", config.licence],
        ["merged LoRAs", ", ".join(merged) or "none"],
    ]
    return _table(["setting", "value"], rows)


def _recipe(record: Mapping[str, Any]) -> str:
    kept = ("convert", "recover", "versions")
    settings = {name: record[name] for name in kept if name in record}
    if asked := record.get("source", {}).get("asked"):
        settings = {"source": asked, **settings}
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    return f"```json\n{text}\n```\n\nThe full record is in `conversion.json`."


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _listed(values: Sequence[int]) -> str:
    """All values, or one number where all layers share it."""
    return ", ".join(map(str, values[:1] if len(set(values)) == 1 else values))

"""What a converted folder says about itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCardData

from vmla_convert.config import ModelConfig
from vmla_convert.tables import to_dict


def model_card(config: ModelConfig, origin: Mapping[str, Any]) -> str:
    """README.md of a converted checkpoint: licence and base model are the source's, never ours.

    Args:
        config: Of the converted model.
        origin: What it was converted from, as conversion.json has it under `source`.
    """
    name = origin.get("name", "a checkpoint")
    merged = [f"{lora['name']} (scale {lora['scale']:g})" for lora in origin.get("loras", ())]
    assert config.mla is not None
    data = ModelCardData(
        license=config.licence,
        base_model=config.base_model if config.base_model != "unknown" else None,
        library_name="vmla-convert",
        tags=["vmla", "latent-kv-cache", "causal-video-diffusion"],
    )
    ranks = config.mla.kv_lora_rank
    ropes = tuple(2 * len(pairs) for pairs in config.mla.rope_pairs)
    nope = config.mla.qk_nope_head_dim
    truncated = f"| qk_nope_head_dim | {nope} |\n" if nope else ""
    dense = config.geometry.dense_cache_scalars
    return f"""---
{data.to_yaml()}
---

# {name}, converted to a latent KV cache

Converted by vmla-convert: each layer caches {config.cache_scalars_per_token():.4g} numbers per
token instead of {dense} ({config.cache_cut():.1%} less).

| setting | value |
|---|---|
| init | {config.mla.init} |
| layer | {", ".join(f"{name} = {value}" for name, value in to_dict(config.mla.layer).items())} |
| kv_lora_rank, layer by layer | {_listed(ranks)} |
| qk_rope_head_dim | {_listed(ropes)} |
{truncated}| family of the source | {config.family} |
| LoRAs merged before | {", ".join(merged) or "none"} |
| licence of the source | {config.licence} |
| base model | {config.base_model} |

```python
import vmla_convert as vmla

model = vmla.load("this folder")
```

How it was made, with the source's hash and all settings: `conversion.json`.
"""


def _listed(values: tuple[int, ...]) -> str:
    """One number where all layers share it."""
    return ", ".join(map(str, values[:1] if len(set(values)) == 1 else values))

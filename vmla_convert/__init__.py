"""Convert trained causal video diffusion transformers to a small latent KV cache.

    import vmla_convert as vmla

    model = vmla.load("runs/quickstart/converted")
    for chunk in vmla.generate(model, prompt="7", frames=240):
        ...  # clean latents, chunk by chunk

The public names load on first use, so that importing the package stays quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vmla_convert.config import MediaConfig, RuntimeConfig, SourceConfig
    from vmla_convert.pipelines.convert import convert
    from vmla_convert.pipelines.export import export
    from vmla_convert.pipelines.generate import generate
    from vmla_convert.pipelines.inspect import inspect_checkpoint as inspect
    from vmla_convert.pipelines.interop.pipeline import VMLAPipeline
    from vmla_convert.pipelines.interop.transformer import VMLATransformer
    from vmla_convert.pipelines.load import load
    from vmla_convert.pipelines.media import open_media
    from vmla_convert.pipelines.publish import push
    from vmla_convert.pipelines.recovery import recover

__version__ = "0.1.0"

__all__ = [
    "MediaConfig",
    "RuntimeConfig",
    "SourceConfig",
    "VMLAPipeline",
    "VMLATransformer",
    "__version__",
    "convert",
    "export",
    "generate",
    "inspect",
    "load",
    "open_media",
    "push",
    "recover",
]

_LAZY = {
    "MediaConfig": ("vmla_convert.config", "MediaConfig"),
    "RuntimeConfig": ("vmla_convert.config", "RuntimeConfig"),
    "SourceConfig": ("vmla_convert.config", "SourceConfig"),
    "VMLAPipeline": ("vmla_convert.pipelines.interop.pipeline", "VMLAPipeline"),
    "VMLATransformer": ("vmla_convert.pipelines.interop.transformer", "VMLATransformer"),
    "convert": ("vmla_convert.pipelines.convert", "convert"),
    "export": ("vmla_convert.pipelines.export", "export"),
    "generate": ("vmla_convert.pipelines.generate", "generate"),
    "inspect": ("vmla_convert.pipelines.inspect", "inspect_checkpoint"),
    "load": ("vmla_convert.pipelines.load", "load"),
    "open_media": ("vmla_convert.pipelines.media", "open_media"),
    "push": ("vmla_convert.pipelines.publish", "push"),
    "recover": ("vmla_convert.pipelines.recovery", "recover"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _LAZY[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)

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
    from vmla_convert.fitting.convert import convert
    from vmla_convert.fitting.inspect import inspect_checkpoint as inspect
    from vmla_convert.generating.generate import generate, resume
    from vmla_convert.interop.attach import attach, detach
    from vmla_convert.interop.fit import fit
    from vmla_convert.interop.observe import observe
    from vmla_convert.interop.pipeline import VMLAPipeline
    from vmla_convert.interop.transformer import VMLATransformer
    from vmla_convert.loading.export import export
    from vmla_convert.loading.load import load
    from vmla_convert.loading.publish import push
    from vmla_convert.media.open import open_media
    from vmla_convert.recovery.recover import recover

__version__ = "0.1.0"

__all__ = [
    "MediaConfig",
    "RuntimeConfig",
    "SourceConfig",
    "VMLAPipeline",
    "VMLATransformer",
    "__version__",
    "attach",
    "convert",
    "detach",
    "export",
    "fit",
    "generate",
    "inspect",
    "load",
    "observe",
    "open_media",
    "push",
    "recover",
    "resume",
]

_LAZY = {
    "MediaConfig": ("vmla_convert.config", "MediaConfig"),
    "RuntimeConfig": ("vmla_convert.config", "RuntimeConfig"),
    "SourceConfig": ("vmla_convert.config", "SourceConfig"),
    "VMLAPipeline": ("vmla_convert.interop.pipeline", "VMLAPipeline"),
    "VMLATransformer": ("vmla_convert.interop.transformer", "VMLATransformer"),
    "attach": ("vmla_convert.interop.attach", "attach"),
    "convert": ("vmla_convert.fitting.convert", "convert"),
    "detach": ("vmla_convert.interop.attach", "detach"),
    "export": ("vmla_convert.loading.export", "export"),
    "fit": ("vmla_convert.interop.fit", "fit"),
    "generate": ("vmla_convert.generating.generate", "generate"),
    "inspect": ("vmla_convert.fitting.inspect", "inspect_checkpoint"),
    "load": ("vmla_convert.loading.load", "load"),
    "observe": ("vmla_convert.interop.observe", "observe"),
    "open_media": ("vmla_convert.media.open", "open_media"),
    "push": ("vmla_convert.loading.publish", "push"),
    "resume": ("vmla_convert.generating.generate", "resume"),
    "recover": ("vmla_convert.recovery.recover", "recover"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _LAZY[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)

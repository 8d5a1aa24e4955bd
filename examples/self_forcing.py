"""Fit and attach a codec in Self-Forcing's own pipeline, or in that of a fork, on a CPU.

    git clone https://github.com/guandeh17/Self-Forcing
    python examples/self_forcing.py Self-Forcing

Pipeline class, scheduler and model are those of the checkout. The weights are random and the sizes
small, so the video means nothing; the script shows that the cache works. Packages that the checkout
imports and that are not installed are replaced by empty modules.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.machinery
import io
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vmla_convert as vmla
from vmla_convert.config import CodecConfig, Sizes
from vmla_convert.layers.codec import LayerCodec
from vmla_convert.loading.codec import Codec

LAYERS, ROWS, COLUMNS = 3, 4, 4
WIDTH, HEADS = 1536, 12  # written into the pipeline's cache
FRAMES, CHUNK = 15, 3
PROMPTS = ["a fox", "a dog", "a ship", "a tree"]


def main() -> None:
    """Run the ten lines of the README, and compare with the dense cache."""
    parser = argparse.ArgumentParser(description="A codec in Self-Forcing's own pipeline.")
    parser.add_argument("checkout", type=Path, help="a checkout of Self-Forcing or of a fork")
    parser.add_argument("--out", type=Path, default=Path("runs/my-model-kv"))
    parser.add_argument("--window", type=int, default=6, help="frames")
    parser.add_argument("--sink", type=int, default=1, help="frames")
    given = parser.parse_args()
    pipeline = open_pipeline(given.checkout.resolve(), given.window, given.sink)
    noise = torch.randn(1, FRAMES, 16, 2 * ROWS, 2 * COLUMNS)
    dense = rollout(pipeline, noise)
    before = sum(cache[side].nbytes for cache in pipeline.kv_cache1 for side in "kv")

    with vmla.observe(pipeline) as seen, quiet():
        for prompt in PROMPTS:
            pipeline.inference(noise, [prompt])
    codec = vmla.fit(seen)
    codec.save(given.out)
    attached = vmla.attach(pipeline, codec, bytes_per_token=200)

    print(
        f"{type(pipeline).__module__}.{type(pipeline).__name__}, window {given.window}, "
        f"sink {given.sink}, {FRAMES} frames in chunks of {CHUNK}"
    )
    print(f"error of each chunk   {errors(rollout(pipeline, noise), dense)}")
    print(f"bytes of the cache    {before:,} before, {attached.nbytes:,} after")
    vmla.detach(pipeline)
    print(f"detached              {difference(rollout(pipeline, noise), dense)}")
    vmla.attach(pipeline, lossless(codec), cache_dtype="model", check_base=False)
    print(f"codec without loss    {difference(rollout(pipeline, noise), dense)}")
    vmla.detach(pipeline)


def rollout(pipeline: Any, noise: Tensor) -> Tensor:
    """Latents (B, F, C, height, width), with the same random numbers at each call."""
    torch.manual_seed(1)
    with quiet():
        return pipeline.inference(noise, ["a bird"], return_latents=True)[1]


def errors(found: Tensor, expected: Tensor) -> str:
    """Relative error of each chunk."""
    chunks = zip(found.split(CHUNK, 1), expected.split(CHUNK, 1), strict=True)
    return ", ".join(f"{float((a - b).norm() / b.norm()):.1e}" for a, b in chunks)


def difference(found: Tensor, expected: Tensor) -> str:
    """Largest difference of any number."""
    return f"differs from the dense rollout by {float((found - expected).abs().max()):.1e} at most"


def lossless(codec: Codec) -> Codec:
    """A codec of the same model with as many channels as numbers: a reflection, undone exactly."""
    channels = 2 * WIDTH
    axis = F.normalize(torch.randn(channels), dim=0)
    layer = LayerCodec(WIDTH, HEADS, channels).requires_grad_(False)
    layer.encode.copy_(torch.eye(channels) - 2 * torch.outer(axis, axis))
    layer.decode.copy_(layer.encode.mT)
    settings = CodecConfig(channels, Sizes(rank=channels))
    return Codec(replace(codec.config, codec=settings), (layer,) * LAYERS, codec.record)


def open_pipeline(checkout: Path, window: int, sink: int) -> Any:
    """The checkout's causal pipeline with a small random model."""
    torch.manual_seed(0)
    install_stand_ins(checkout)
    wrapper_module = import_module("utils.wan_wrapper")
    network = import_module("wan.modules.causal_model")
    # Attention on a CPU, in float32.
    network.attention = attend
    import_module("wan.modules.model").flash_attention = attend
    model = network.CausalWanModel(
        dim=WIDTH, ffn_dim=WIDTH, num_heads=HEADS, num_layers=LAYERS, text_dim=64,
        local_attn_size=window, sink_size=sink,
    ).eval().requires_grad_(False)  # fmt: skip
    nn.init.normal_(model.head.head.weight, std=0.02)  # zero in the code
    wrapper = wrapper_module.WanDiffusionWrapper.__new__(wrapper_module.WanDiffusionWrapper)
    nn.Module.__init__(wrapper)
    wrapper.model, wrapper.uniform_timestep, wrapper.seq_len = model, False, 32760
    wrapper.scheduler = import_module("utils.scheduler").FlowMatchScheduler(
        shift=5.0, sigma_min=0.0, extra_one_step=True
    )
    wrapper.scheduler.set_timesteps(1000, training=True)
    wrapper.post_init()
    args = SimpleNamespace(
        denoising_step_list=[1000, 500], warp_denoising_step=False, num_frame_per_block=CHUNK,
        independent_first_frame=False, context_noise=0,
    )  # fmt: skip
    with quiet():
        pipeline = import_module("pipeline.causal_inference").CausalInferencePipeline(
            args, "cpu", generator=wrapper, text_encoder=TextEncoder(), vae=Decoder()
        )
    pipeline.num_transformer_blocks, pipeline.frame_seq_length = LAYERS, ROWS * COLUMNS
    return pipeline


def attend(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    """Attention (B, L, H, D) in the dtype of the model."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


class TextEncoder(nn.Module):
    """Stands for the text encoder: numbers that depend on the prompt."""

    def forward(self, text_prompts: Sequence[str]) -> dict[str, Tensor]:
        """Contexts (B, 512, 64)."""
        seeds = (torch.Generator().manual_seed(sum(map(ord, text))) for text in text_prompts)
        return {"prompt_embeds": torch.stack([torch.randn(512, 64, generator=s) for s in seeds])}


class Decoder(nn.Module):
    """Stands for the VAE."""

    def decode_to_pixel(self, latent: Tensor, use_cache: bool = False) -> Tensor:  # noqa: ARG002
        """The latents."""
        return latent


class StandIn(ModuleType):
    """A module in which every name is an empty class."""

    __path__ = ()

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (dict,), {})


class Finder:
    """Gives stand-ins for what a checkout imports and nobody installed, but for attention."""

    def __init__(self, checkout: Path) -> None:
        self.checkout, self.names = checkout, set[str]()

    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        """Stand in only for imports of the checkout itself."""
        frame = sys._getframe(1)
        while frame.f_back and "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        top = name.partition(".")[0]
        if Path(frame.f_code.co_filename).is_relative_to(self.checkout):
            self.names.add(top)
        wanted = top in self.names and "attn" not in top and "attention" not in top
        return importlib.machinery.ModuleSpec(name, self) if wanted else None  # pyright: ignore

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """Make the module."""
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


def install_stand_ins(checkout: Path) -> None:
    """Make the checkout importable on a machine without a GPU."""
    sys.path.insert(0, str(checkout))
    sys.meta_path.append(Finder(checkout))  # pyright: ignore[reportArgumentType]
    torch.cuda.current_device = lambda: 0  # asked for at import


quiet = partial(contextlib.redirect_stdout, io.StringIO())  # the pipeline prints each step

if __name__ == "__main__":
    main()

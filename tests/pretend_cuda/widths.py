"""Layers of true width on the device, without numbers: their bytes, waits and kernels.

The scenarios print figures; `test_true_widths.py` holds them to bounds and to the formulas.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import device
import pytest
import torch

from evals.scale import SIZES
from vmla_convert.config import (
    CachePolicy,
    CodecConfig,
    ConvertConfig,
    MLAConfig,
    ModelConfig,
    RecoverConfig,
    RuntimeConfig,
    SamplerConfig,
    Sizes,
    TrainingConfig,
)
from vmla_convert.demo.world import Split
from vmla_convert.kernels import available
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.layers.memory import ClipShape, streaming_memory
from vmla_convert.maths.rates import Rate
from vmla_convert.media.clips import Batch
from vmla_convert.progress import Silent
from vmla_convert.storage.tensor_store import MemoryStore

OPENS_DEVICE = True
FRAME = (60, 104)  # of 480p video
CHANNELS = 256


def true_width(size: str, product: str, layers: int = 1, window: int = 21) -> ModelConfig:
    """A model of true width with few layers."""
    geometry = replace(SIZES[size], num_layers=layers)
    config = ModelConfig(geometry, FRAME, 3, CachePolicy(window), SamplerConfig())
    if product == "codec":
        return replace(config, codec=CodecConfig(CHANNELS, Sizes(cut=0.95)))
    mla = MLAConfig((192,) * layers, (tuple(range(16)),) * layers, "spectral")
    return replace(config, mla=mla) if product == "mla" else config


def on_card(config: ModelConfig, dtype: torch.dtype) -> CausalWanModel:
    """A frozen model of the device without numbers."""
    with torch.device("meta"):
        model = CausalWanModel(config)
    for module in model.modules():
        for kind in (module._parameters, module._buffers):
            for name, tensor in kind.items():
                if tensor is not None:
                    wide = torch.float32 if kind is module._buffers else dtype
                    made: Any = torch.empty(tensor.shape, dtype=wide, device="cuda")
                    if kind is module._parameters:
                        made = torch.nn.Parameter(made, requires_grad=False)
                    kind[name] = made
    for block in model.all_blocks():
        if block.codec is not None:
            # Energies without numbers give no rate.
            block.codec.rate = Rate((8,) * CHANNELS, quantised=True)
    return model.eval()


class Clips:
    """Clips of zeros."""

    def __init__(self, frames: int) -> None:
        self.frames = frames

    def batch(self, start: int, size: int, split: Split = "train") -> Batch:
        """Some clips."""
        del start, split
        latents = torch.zeros(size, self.frames, 16, *FRAME)
        return Batch(latents, torch.zeros(size, 512, 4096))


def calibration(size: str, frames: int, window: int, clips: int, mixed: Any, product: Any) -> Any:
    """Peak bytes of a calibration of two layers, and the formula's."""
    from vmla_convert.fitting import calibrate
    from vmla_convert.fitting.memory import calibration_memory

    config = true_width(size, "dense", 2, window)
    with device.pretend(computes=False) as card:
        model = on_card(config, torch.float32)
        # The formula counts one block, as when a checkpoint is read.
        model.blocks[1] = model.blocks[0]
        blocks = calibrate.model_blocks(model)
        calibrate.calibrate(
            model, blocks, Clips(frames), clips, store=Recorded(), product=product,
            mixed_precision=mixed,
        )  # fmt: skip
    convert = ConvertConfig(product, calibration_clips=clips, mixed_precision=mixed)
    formula = calibration_memory(config, convert, ClipShape(frames, *FRAME))
    return {"peak": card.peak, "formula": formula.device, "lines": card.largest.most_common(12)}


class Recorded(MemoryStore):
    """A store of shapes, as a folder keeps tensors: off the device."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: dict[str, Any] = {}

    def put(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Keep shapes and dtypes."""
        self.shapes[name] = {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()}

    def get(self, name: str) -> dict[str, torch.Tensor]:
        """Zeros of these shapes."""
        return {n: torch.zeros((), dtype=d).expand(s) for n, (s, d) in self.shapes[name].items()}

    def has(self, name: str) -> bool:
        """Whether a group is here."""
        return name in self.shapes

    def drop(self, name: str) -> None:
        """Remove a group."""
        self.shapes.pop(name, None)


def calibration_1_3b(_: object) -> Any:
    """Five clips of 21 frames, which are two groups."""
    return calibration("1.3b", 21, 21, 5, "no", "codec")


def calibration_1_3b_mla(_: object) -> Any:
    """The same for MLA layers, in mixed precision."""
    return calibration("1.3b", 21, 21, 2, "bf16", "mla")


def calibration_14b(_: object) -> Any:
    """Clips of Krea's window."""
    return calibration("14b", 6, 6, 2, "no", "codec")


def recovery(size: str, product: str, frames: int, window: int, **training: Any) -> Any:
    """Peak bytes of steps of distillation of three layers, and the formula's."""
    from vmla_convert.media.clips import seeded
    from vmla_convert.recovery.memory import recovery_memory
    from vmla_convert.recovery.trained import narrow_frozen, unfreeze
    from vmla_convert.training.loop import train
    from vmla_convert.training.losses import make_example, velocity_distillation

    config = true_width(size, product, 3, window)
    settings = TrainingConfig(
        **{
            "steps": 2,
            "batch_size": 1,
            "lr": 1e-4,
            "mixed_precision": "bf16",
            "gradient_checkpointing": True,
            "ema": 0.99,
            **training,
        }
    )
    recover = RecoverConfig(0, training=settings)
    with device.pretend(computes=False) as card:
        student = on_card(config, torch.float32)
        unfreeze(student, "new")
        if settings.mixed_precision != "no":
            narrow_frozen(student, torch.bfloat16)
        dense = shared_dense(student) if product == "codec" else narrow_dense(config, settings)
        if settings.gradient_checkpointing:
            student.checkpoint_blocks(settings.offload_activations)
        held = card.live

        def examples(step: int) -> Any:
            batch = Clips(frames).batch(step, 1)
            return [make_example(batch, 3, seeded(0, step, "noise"))]

        loss = velocity_distillation(dense)
        train(student, loss, examples, settings, lambda *_: 1.0, keep_best=True)
    formula = recovery_memory(config, recover, ClipShape(frames, *FRAME))
    lines = card.largest.most_common(12)
    return {"peak": card.peak, "formula": formula.device, "weights": held, "lines": lines}


def shared_dense(student: CausalWanModel) -> CausalWanModel:
    """The dense model of a codec, which has the same weights."""
    with torch.device("meta"):
        dense = CausalWanModel(replace(student.config, codec=None))
    for name, module in dense.named_modules():
        for key in module._parameters:
            module._parameters[key] = student.get_submodule(name)._parameters[key]
    return dense


def narrow_dense(config: ModelConfig, settings: TrainingConfig) -> CausalWanModel:
    """A dense model with the dtypes of a recovery."""
    from vmla_convert.recovery.trained import narrow_frozen

    dense = on_card(replace(config, mla=None), torch.float32)
    if settings.mixed_precision != "no":
        narrow_frozen(dense, torch.bfloat16)
    return dense


def recovery_1_3b(_: object) -> Any:
    """A codec as its recipe recovers it."""
    return recovery("1.3b", "codec", 21, 21, offload_activations=True)


def recovery_1_3b_kept(_: object) -> Any:
    """Without offloading, in float32."""
    return recovery("1.3b", "codec", 9, 21, mixed_precision="no")


def recovery_1_3b_mla(_: object) -> Any:
    """MLA layers beside their dense model."""
    return recovery("1.3b", "mla", 9, 21)


def recovery_14b(_: object) -> Any:
    """A codec of Krea's model."""
    return recovery("14b", "codec", 6, 6)


def streaming(size: str, product: str, dtype: Any = "auto") -> Any:
    """Peak bytes of generating with a full window, with kernels of the package and without.

    The formula counts plain torch, which needs more. What the last pass of a chunk waits for, and
    its float64 results, may not grow with layers.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(available, "HAS_TRITON", False)
        plain = _streaming(size, product, dtype)
    patched = _streaming(size, product, dtype) if find_spec("triton") else plain
    return patched | {"peak with kernels": patched["peak"], "peak": plain["peak"]}


def _streaming(size: str, product: str, dtype: Any) -> Any:
    # The formula counts the larger one of the two backends of MLA layers.
    runtime = RuntimeConfig(
        backend="materialised" if product == "mla" else "auto", cache_dtype=dtype
    )
    passes: list[device.Device] = []
    peaks: list[int] = []
    for layers in (1, 2):
        config = true_width(size, product, layers)
        with device.pretend(computes=False) as card, torch.no_grad():
            model = on_card(config, torch.bfloat16)
            prompt = model.project_prompt(torch.zeros(1, 512, 4096).to("cuda", torch.bfloat16))
            cache = model.new_cache(1, runtime)
            chunk = torch.zeros(1, 3, 16, *FRAME).to("cuda", torch.bfloat16)
            levels = torch.zeros(1, 3).to("cuda")
            for _ in range(8):
                cache.open_chunk(3)
                model.stream(chunk, levels, prompt, cache)
            peaks.append(card.peak)
            cache.open_chunk(3)
            model.stream(chunk, levels, prompt, cache, keep=False)
            card.reset()
            model.stream(chunk, levels, prompt, cache, keep=False)
            model.stream(chunk, levels, prompt, cache)
        passes.append(card)
    one, two = passes
    formula = streaming_memory(true_width(size, product, 2), runtime, 2)
    return {
        "peak": peaks[1],
        "formula": formula.device,
        "kernels of a layer": two.kernels.total() - one.kernels.total(),
        "waits of a layer": dict(two.waits - one.waits),
        "doubles of a layer": dict(two.doubles - one.doubles),
        "attention": dict(two.attention),
    }


def stream_codec(_: object) -> Any:
    """The codec's path at the width of Wan 1.3B."""
    return {"codec": streaming("1.3b", "codec")}


def stream_1_3b(_: object) -> Any:
    """The other paths at the width of Wan 1.3B."""
    paths = [("dense", "auto"), ("dense", "int8"), ("mla", "auto")]
    return {f"{product} {dtype}": streaming("1.3b", product, dtype) for product, dtype in paths}


def stream_14b(_: object) -> Any:
    """Every path at the width of Wan 14B."""
    paths = [("dense", "auto"), ("codec", "auto"), ("dense", "int4"), ("mla", "auto")]
    return {f"{product} {dtype}": streaming("14b", product, dtype) for product, dtype in paths}


def layerwise(size: str, frames: int, window: int) -> Any:
    """Peak bytes of fitting one layer of a sharded recovery, and the formula's."""
    from vmla_convert.recovery import layerwise as stage
    from vmla_convert.recovery.memory import recovery_memory

    config = true_width(size, "codec", 2, window)
    training = TrainingConfig(
        steps=0, batch_size=8, mixed_precision="bf16", gradient_checkpointing=True
    )
    recover = RecoverConfig(1, training=training, shard=True)
    with device.pretend(computes=False) as card, pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "open_clips", lambda *_: Clips(frames))
        patch.setattr(stage, "apply_layers", lambda *_: None)
        student = on_card(config, torch.float32)
        codecs = [block.codec for block in student.all_blocks()]
        # One block stands for each block that is read.
        block, shell = student.all_blocks()[0], student
        dense = on_card(replace(config, codec=None), torch.float32).all_blocks()[0]
        for each in shell.all_blocks()[1:]:
            for name in ("self_attn", "cross_attn", "ffn"):
                setattr(each, name, getattr(block, name))

        def layer(index: int) -> Any:
            block.codec = codecs[index]
            return block

        stage.fit_layers(student, shell, lambda _: dense, recover, None, Silent(), layer)
    formula = recovery_memory(config, recover, ClipShape(frames, *FRAME))
    return {"peak": card.peak, "formula": formula.device, "lines": card.largest.most_common(12)}


def layerwise_1_3b(_: object) -> Any:
    """The layer-wise stage of Wan 1.3B on clips of 21 frames."""
    return layerwise("1.3b", 21, 21)


def layerwise_14b(_: object) -> Any:
    """The layer-wise stage of Krea's model."""
    return layerwise("14b", 6, 6)


def vae(_: object) -> Any:
    """Peak bytes of decoding two frames in tiles, those kept between frames, and the formulas'."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    from vmla_convert.config import MediaConfig
    from vmla_convert.media.memory import decoding_memory, vae_kept_bytes
    from vmla_convert.media.wan import WanMedia

    media = WanMedia.__new__(WanMedia)
    media.how, media.stride = MediaConfig(vae_tiling=True), 8
    media.device, media.dtype = device.CARD, torch.bfloat16
    with torch.device("meta"):
        model = AutoencoderKLWan()
    with device.pretend(computes=False) as card, torch.no_grad():
        for module in model.modules():
            for name, tensor in module._parameters.items():
                if tensor is not None:
                    made = torch.empty(tensor.shape, dtype=torch.bfloat16, device="cuda")
                    module._parameters[name] = torch.nn.Parameter(made, requires_grad=False)
        vars(media)["vae"] = model
        decoder = media.decoder()
        for _frame in range(2):
            decoder.decode(torch.zeros(1, 1, 16, *FRAME).to("cuda", torch.bfloat16))
        kept = card.live
    return {
        "peak": card.peak,
        "formula": decoding_memory(FRAME, 2, True).device,
        "kept": kept,
        "kept formula": vae_kept_bytes(FRAME, 2, True),
    }

"""A codec in SGLang's own causal denoising stage, which runs a small transformer of this file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checkpoints import MODEL
from conftest import noise
from sglang_files import STAGE, files_of_sglang
from torch import Tensor, nn

from vmla_convert.config import CodecConfig, Sizes
from vmla_convert.errors import ConfigError
from vmla_convert.interop import sglang_plugin
from vmla_convert.interop.sglang_cache import CodecKVCache
from vmla_convert.layers.codec import LayerCodec
from vmla_convert.loading.codec import Codec
from vmla_convert.maths.rates import Rate
from vmla_convert.maths.rope3d import rotary_table, rotate, token_positions

pytest_plugins = ["checkpoints", "codec_files"]

GEOMETRY = MODEL.geometry
DIM, HEADS, LAYERS, HEAD_DIM = (
    GEOMETRY.dim,
    GEOMETRY.num_heads,
    GEOMETRY.num_layers,
    GEOMETRY.head_dim,
)
CHANNELS, SIDE, PATCH, CHUNK, WINDOW = 3, 4, 2, 2, 6
PLUGIN = "vmla_convert.interop.sglang_plugin"


class Transformer(nn.Module):
    """Self-attention layers that call their cache as SGLang's causal Wan transformer does."""

    num_attention_heads, attention_head_dim = HEADS, HEAD_DIM
    config = SimpleNamespace(patch_size=(1, PATCH, PATCH))
    independent_first_frame = False
    keys: Tensor

    def __init__(self) -> None:
        super().__init__()
        width = CHANNELS * PATCH**2
        self.enter, self.leave = nn.Linear(width, DIM), nn.Linear(DIM, width)
        self.layers = nn.ModuleList(nn.Linear(DIM, 3 * DIM) for _ in range(LAYERS))
        for index, parameter in enumerate(self.parameters()):
            parameter.data = 0.3 * noise(*parameter.shape, seed=index)

    def forward(
        self,
        latents: Tensor,
        prompt: Any,  # noqa: ARG002
        timestep: Tensor,
        *,
        kv_cache: Any,
        crossattn_cache: Any,  # noqa: ARG002
        current_start: int,
        start_frame: int,
    ) -> Tensor:
        frames, side = latents.shape[2], SIDE // PATCH
        parts = latents.unflatten(-1, (side, PATCH)).unflatten(-3, (side, PATCH))
        x = self.enter(parts.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3))
        positions = token_positions(torch.arange(start_frame, start_frame + frames), side, side)
        rotary = rotary_table(positions, HEAD_DIM)
        for layer, cache in zip(self.layers, kv_cache, strict=True):
            normed = F.layer_norm(x, (DIM,)) + timestep[0] / 1e3
            query, key, value = (
                part.unflatten(-1, (HEADS, -1)) for part in layer(normed).chunk(3, -1)
            )
            self.keys = F.normalize(key, dim=-1)
            view = cache.update_and_get_attention_kv(
                key=rotate(self.keys, rotary),
                value=value,
                current_chunk_start=current_start,
                cache_head_start=0,
            )
            rows = [t.transpose(1, 2) for t in (rotate(query, rotary), view.k, view.v)]
            attended = F.scaled_dot_product_attention(rows[0], rows[1], rows[2])
            x = x + attended.transpose(1, 2).flatten(2)
        parts = self.leave(F.layer_norm(x, (DIM,))).unflatten(-1, (CHANNELS, PATCH, PATCH))
        return (
            parts.unflatten(1, (frames, side, side))
            .permute(0, 4, 1, 2, 5, 3, 6)
            .reshape_as(latents)
        )


class WholeCodec(Codec):
    """A codec that loses nothing."""

    def rates(self, *_: Any, **__: Any) -> list[Rate]:
        return [Rate((16,) * 2 * DIM, quantised=False)] * LAYERS


@pytest.fixture(scope="module")
def whole() -> WholeCodec:
    layers = []
    for index in range(LAYERS):
        layer = LayerCodec(DIM, HEADS, 2 * DIM)
        layer.encode.data = torch.linalg.qr(noise(2 * DIM, 2 * DIM, seed=index))[0]
        layer.decode.data = layer.encode.data.mT.contiguous()
        layers.append(layer)
    config = replace(MODEL, codec=CodecConfig(2 * DIM, Sizes(cut=0.0)))
    return WholeCodec(config, tuple(layers), {})


@pytest.fixture
def stage_module() -> Iterator[Any]:
    """SGLang's module of causal denoising stages."""
    parallel = {"get_tp_world_size": lambda: 1, "get_sp_world_size": lambda: 1}
    stubs: dict[str, Any] = {
        "autocast_context": lambda *_, **__: nullcontext(),
        "set_forward_context": lambda **_: nullcontext(),
        "pred_noise_to_pred_video": lambda pred_noise, noise_input_latent, **_: (
            noise_input_latent - pred_noise
        ),
        "AttentionBackendEnum": SimpleNamespace(VIDEO_SPARSE_ATTN=1),
    }
    with files_of_sglang(stubs | parallel) as load:
        yield load(STAGE)


def new_stage(module: Any, sink: int = 0) -> Any:
    """A denoising stage, without what the program around it sets up."""
    stage = module.CausalDMDDenoisingStage.__new__(module.CausalDMDDenoisingStage)
    vars(stage).update(
        transformer=Transformer(),
        causal_kv_cache=None,
        crossattn_cache=None,
        num_transformer_blocks=LAYERS,
        num_frames_per_block=CHUNK,
        sliding_window_num_frames=WINDOW,
        local_attn_size=-1,
        sink_size=sink,
        attn_backend=SimpleNamespace(get_enum=lambda: 0),
        progress_bar=lambda **_: nullcontext(),
        _component_residency_manager=None,
        _get_max_text_len=lambda _: 1,
    )
    return stage


def film(module: Any, stage: Any, frames: int, size: int = SIDE, warm: int = 0) -> Tensor:
    """Latents (1, C, F, h, w) that the stage makes, after `warm` frames that are given."""
    latents = noise(1, CHANNELS, frames, size, size, seed=5)
    stage._prepare_frame_seq_length(size, size)
    stage._prepare_causal_dmd_forward_context = lambda *_: module.CausalDMDForwardContext(
        target_dtype=torch.float32,
        autocast_enabled=False,
        device=torch.device("cpu"),
        scheduler=SimpleNamespace(add_noise=lambda x, noise, _: 0.6 * x + 0.8 * noise),
        timesteps=torch.tensor([1000.0, 500.0]),
        latents=latents,
        prompt_embeds=[],
        image_kwargs={},
        pos_cond_kwargs={},
        batch_size=1,
        channels=CHANNELS,
        num_frames=frames,
        height=size,
        width=size,
    )
    given = noise(1, CHANNELS, warm, size, size, seed=6) if warm else None
    batch = SimpleNamespace(
        extra={}, image_latent=given, generator=torch.Generator().manual_seed(3), latents=latents
    )
    return stage.forward(batch, SimpleNamespace(pipeline_config=SimpleNamespace())).latents


Connected = Callable[[Codec], None]


@pytest.fixture
def connected(stage_module: Any) -> Connected:
    def connect(codec: Codec) -> None:
        parallel = import_module("sglang.multimodal_gen.runtime.distributed")
        sglang_plugin.connect(stage_module.CausalDMDDenoisingStage, codec, None, parallel)

    return connect


@pytest.mark.parametrize("sink", [0, 1])
@pytest.mark.parametrize("warm", [0, 2], ids=["text", "first frames given"])
def test_films_of_a_full_rank_codec_are_those_of_the_dense_cache(
    sink: int, warm: int, whole: Codec, stage_module: Any, connected: Connected
) -> None:
    """Two films of 10 frames, in a window of 6."""
    stage = new_stage(stage_module, sink)
    dense = [film(stage_module, stage, 10, warm=warm) for _ in range(2)]
    connected(whole)
    stage = new_stage(stage_module, sink)
    for expected in dense:
        assert expected.std() > 0.1
        found = film(stage_module, stage, 10, warm=warm)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert all(isinstance(cache, CodecKVCache) for cache in stage.causal_kv_cache)


@pytest.mark.parametrize("warm", [0, 2], ids=["text", "first frames given"])
def test_keys_are_encoded_as_they_were_before_their_rotation(
    warm: int,
    whole: Codec,
    stage_module: Any,
    connected: Connected,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After given frames, SGLang counts tokens from these and rotations from the films' own."""
    encoded: list[Tensor] = []
    channels = LayerCodec.channels

    def noted(codec: LayerCodec, key: Tensor, value: Tensor, rate: Rate) -> Tensor:
        encoded.append(key)
        return channels(codec, key, value, rate)

    monkeypatch.setattr(LayerCodec, "channels", noted)
    connected(whole)
    stage = new_stage(stage_module)
    film(stage_module, stage, 4, warm=warm)
    torch.testing.assert_close(encoded[-1], stage.transformer.keys.flatten(2))


# The package that SGLang imports


@pytest.fixture
def imported(monkeypatch: pytest.MonkeyPatch, stage_module: Any) -> Callable[..., None]:  # noqa: ARG001
    """Import the package as SGLang does, with some environment variables."""

    def load(**settings: str) -> None:
        for name in (sglang_plugin.CODEC, sglang_plugin.SIZE):
            monkeypatch.delenv(name, raising=False)
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delitem(sys.modules, PLUGIN, raising=False)
        import_module(PLUGIN)

    monkeypatch.setenv(sglang_plugin.PACKAGE, PLUGIN)
    return load


@pytest.mark.parametrize("size", [24, 8])
def test_the_environment_names_codec_and_size(
    size: int, codec: Path, imported: Callable[..., None], stage_module: Any
) -> None:
    imported(VMLA_CODEC=str(codec), VMLA_BYTES_PER_TOKEN=str(size))
    stage = new_stage(stage_module)
    assert film(stage_module, stage, 10).isfinite().all()
    caches, slots = stage.causal_kv_cache, WINDOW * (SIDE // PATCH) ** 2
    assert sum(cache.nbytes for cache in caches) <= size * slots * LAYERS
    assert sum(cache.nbytes for cache in caches) > (size - 2) * slots * LAYERS
    assert [cache.cache_size for cache in caches] == [slots] * LAYERS


def test_the_size_may_be_left_to_the_codec(
    codec: Path, imported: Callable[..., None], stage_module: Any
) -> None:
    imported(VMLA_CODEC=str(codec))
    assert film(stage_module, new_stage(stage_module), 4).isfinite().all()


@pytest.mark.parametrize(
    ("settings", "named"),
    [({}, "VMLA_CODEC"), ({"VMLA_CODEC": "kv", "VMLA_BYTES_PER_TOKEN": "few"}, "few")],
)
def test_settings_that_make_no_sense_are_refused(
    settings: dict[str, str], named: str, imported: Callable[..., None]
) -> None:
    with pytest.raises(ConfigError, match=named):
        imported(**settings)


def test_the_package_does_nothing_unless_sglang_names_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(sglang_plugin.PACKAGE, raising=False)
    monkeypatch.delitem(sys.modules, PLUGIN, raising=False)
    import_module(PLUGIN)


def test_a_codec_of_another_model_is_refused(
    whole: Codec, stage_module: Any, connected: Connected
) -> None:
    connected(whole)
    stage = new_stage(stage_module)
    stage.num_transformer_blocks = LAYERS + 1
    with pytest.raises(ConfigError, match=f"{LAYERS + 1} layers"):
        film(stage_module, stage, 4)


def test_processes_that_share_the_tokens_are_refused(whole: Codec, stage_module: Any) -> None:
    parallel = SimpleNamespace(get_sp_world_size=lambda: 2)
    sglang_plugin.connect(stage_module.CausalDMDDenoisingStage, whole, None, parallel)
    with pytest.raises(ConfigError, match="2 processes"):
        film(stage_module, new_stage(stage_module), 4)


def test_positions_between_frames_are_refused(
    whole: Codec, stage_module: Any, connected: Connected
) -> None:
    connected(whole)
    stage = new_stage(stage_module)
    forward = stage._forward_causal_transformer
    stage._forward_causal_transformer = lambda batch, **given: forward(
        batch, **given | {"start_frame": given["start_frame"] + 0.5}
    )
    with pytest.raises(ConfigError, match=r"0\.5"):
        film(stage_module, stage, 4)

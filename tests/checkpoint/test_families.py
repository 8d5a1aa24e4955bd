"""Every family's own file form opens as the same native model; incomplete files are refused."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import noise, randomise, tiny_clip, tiny_model
from family_files import (
    FORMS,
    GEOMETRY,
    Tensors,
    diffusers_config,
    frame_rate_tensors,
    native_config,
    with_frame_rate,
    with_lora,
    wrap,
    write_a14b,
    write_diffusers,
    write_header,
    write_json,
    write_longlive,
    write_pickle,
    write_rolling_forcing,
    write_skyreels,
    write_skyreels_diffusers,
    write_wan,
    write_weights,
)
from reference.masks import block_causal_mask
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vmla_convert.checkpoint.families import FAMILIES, open_checkpoint, recognise
from vmla_convert.checkpoint.geometry import native_shapes
from vmla_convert.checkpoint.keymap import TEXT_TO_VIDEO, fill
from vmla_convert.checkpoint.known import KNOWN, KnownModel
from vmla_convert.checkpoint.settings import DEFAULTS, converted_config
from vmla_convert.checkpoint.writer import write_checkpoint
from vmla_convert.config import (
    CachePolicy,
    Geometry,
    MLAConfig,
    ModelConfig,
    SamplerConfig,
    SourceConfig,
)
from vmla_convert.errors import CheckpointError, ConfigError, VmlaError
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.loading.load import build
from vmla_convert.tables import override

# A small geometry, for tests that never run the model.
SMALL = dataclasses.replace(GEOMETRY, dim=48, num_heads=2, in_dim=4, out_dim=4, text_len=8)
SMALL_CONFIG = native_config(SMALL)
MODEL = ModelConfig(SMALL, (8, 8), 2, CachePolicy(6, 1, "relative"), SamplerConfig(), "demo")
# Frames of two by three tokens.
SETTINGS = {
    "latent_size": [4, 6],
    "chunk_frames": 2,
    "cache": {"window_frames": 6, "sink_frames": 1},
}


@cache
def native(geometry: Geometry = SMALL) -> Tensors:
    """Random weights; callers copy before they change any."""
    return {
        n: noise(*shape, seed=i) for i, (n, shape) in enumerate(native_shapes(geometry).items())
    }


@cache
def sane() -> Tensors:
    """Weights that keep the size of signals, for models that are run."""
    config = ModelConfig(GEOMETRY, (4, 6), 2, CachePolicy(6, 1), SamplerConfig())
    return dict(tiny_model(config).state_dict())


def without(tensors: Tensors, *names: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def small_wan(folder: Path, tensors: Tensors, config: object = SMALL_CONFIG) -> Path:
    return write_wan(folder, tensors, config)


def refused(
    path: Path,
    *facts: str,
    how: SourceConfig | None = None,
    kind: type[VmlaError] = CheckpointError,
) -> None:
    """Opening fails with a hint, and with all facts in the message or the hint."""
    with pytest.raises(kind) as caught:
        open_checkpoint(path, how)
    assert caught.value.hint
    for fact in facts:
        assert fact in f"{caught.value.message} ({caught.value.hint})"


# Families


@pytest.mark.parametrize("name", FORMS)
def test_every_form_reads_back_as_the_same_native_model(name: str, tmp_path: Path) -> None:
    form = FORMS[name]
    path = form.write(tmp_path, sane())
    loras = (str(path.parent / form.lora),) if form.lora else ()
    opened = open_checkpoint(path, SourceConfig(key=form.key, overrides=SETTINGS, loras=loras))
    assert opened.family == opened.config.family == form.family
    assert (opened.unknown, opened.missing) == ((), ())
    # diffusers does not store the prompt length; Wan's own is the default.
    assert opened.config.geometry == GEOMETRY
    expected = form.is_equal_to(sane())
    assert opened.names.keys() == opened.specs().keys() == expected.keys()
    # Equal to the bit, but the frame rate's share of a bias is summed in another order.
    near = 2e-6 if "skyreels" in form.family else 0
    for tensor_name, tensor in expected.items():
        torch.testing.assert_close(opened.read(tensor_name), tensor, atol=near, rtol=near)
        assert opened.specs()[tensor_name].shape == tuple(tensor.shape)
    assert opened.parameters() == sum(tensor.numel() for tensor in expected.values())


def test_every_family_has_a_form() -> None:
    assert {form.family for form in FORMS.values()} == {family.name for family in FAMILIES}


def test_experts_are_opened_by_their_own_paths(tmp_path: Path) -> None:
    folder = write_a14b(tmp_path, native())
    refused(folder, *(str(folder / name) for name in ("high_noise_model", "low_noise_model")))


def test_an_averaged_model_comes_first(tmp_path: Path) -> None:
    path, name = write_rolling_forcing(tmp_path, sane()), "blocks.1.ffn.0.weight"
    for key, sign in ((None, 1), ("generator_ema", 1), ("generator", -1)):
        opened = open_checkpoint(path, SourceConfig(key=key))
        assert torch.equal(opened.read(name), sign * sane()[name])
        assert opened.source.key == (key or "generator_ema")
    refused(path, "'critic'", "generator, generator_ema", how=SourceConfig(key="critic"))


@pytest.mark.parametrize(
    ("channels", "latent_size", "rate"), [(16, (60, 104), 16), (48, (44, 80), 24)]
)
def test_wan_22s_vae_has_smaller_and_more_frames(
    channels: int, latent_size: tuple[int, int], rate: int, tmp_path: Path
) -> None:
    geometry = dataclasses.replace(GEOMETRY, in_dim=channels, out_dim=channels)
    path = write_header(tmp_path, native_shapes(geometry))
    config = open_checkpoint(path).config
    assert (config.latent_size, config.frames_per_second) == (latent_size, rate)
    assert opened_config(path, "latent_size=[8, 8]").latent_size == (8, 8)


@pytest.mark.parametrize(
    ("model", "geometry", "tensors", "parameters"),
    [
        ("self-forcing", Geometry(1536, 8960, 12, 30, 16, 16), 825, 1_418_996_800),
        ("krea-realtime", Geometry(5120, 13824, 40, 40, 16, 16), 1095, 14_288_491_584),
        ("longlive-2", Geometry(3072, 14336, 24, 30, 48, 48), 825, 4_999_787_712),
    ],
)
def test_released_sizes_open_by_their_headers(
    model: str, geometry: Geometry, tensors: int, parameters: int, tmp_path: Path
) -> None:
    """The files are sparse, with data that does not fit into memory."""
    known = KNOWN[model]
    opened = open_checkpoint(
        write_header(tmp_path, native_shapes(geometry)), SourceConfig(model=model)
    )
    assert (len(opened.names), opened.parameters()) == (tensors, parameters)
    assert (opened.config.geometry, opened.known) == (geometry, model)
    cache = opened.config.cache
    assert cache.window_frames == known.settings["cache"]["window_frames"]
    assert cache.sink_frames == known.settings["cache"]["sink_frames"]
    assert opened.config.chunk_frames == known.settings["chunk_frames"]
    assert opened.config.base_model == known.repos[0]


def test_shapes_and_rules_cover_the_same_tensors() -> None:
    filled = {fill(rule.native, i) for rule in TEXT_TO_VIDEO for i in range(GEOMETRY.num_layers)}
    assert native_shapes(GEOMETRY).keys() == filled


# Frame rates


def test_a_frame_rate_changes_one_bias_only(tmp_path: Path) -> None:
    plain, opened = sane(), open_checkpoint(write_skyreels(tmp_path, sane()))
    differ = {name for name in plain if not torch.equal(opened.read(name), plain[name])}
    assert differ == {"time_projection.1.bias"}
    assert opened.config.frames_per_second == 24
    other = open_checkpoint(write_skyreels_diffusers(tmp_path / "other", sane()))
    assert other.config.frames_per_second == 24


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_frame_rate_is_added_in_float32_and_rounded_once(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    low = {name: tensor.to(dtype) for name, tensor in (sane() | frame_rate_tensors()).items()}
    write_json(tmp_path / "config.json", native_config())
    opened = open_checkpoint(write_weights(tmp_path, low))
    name = "time_projection.1.bias"
    wide = {n: t.double() for n, t in low.items()}
    x = wide["fps_embedding.weight"][1]
    for part in ("0", "2"):
        x = wide[f"fps_projection.{part}.weight"] @ x + wide[f"fps_projection.{part}.bias"]
        x = nn.functional.silu(x) if part == "0" else x
    assert opened.read(name).dtype == dtype == opened.specs()[name].dtype
    assert torch.equal(opened.read(name), (wide[name] + x).to(dtype))


@pytest.mark.parametrize("name", frame_rate_tensors())
def test_every_frame_rate_tensor_is_required(name: str, tmp_path: Path) -> None:
    """Without the mark of the family, the other tensors are not part of the model."""
    tensors = native() | frame_rate_tensors(SMALL.dim)
    named = "fps_projection.0.bias" if name == "fps_embedding.weight" else name
    refused(small_wan(tmp_path, without(tensors, name)), named)
    refused(small_wan(tmp_path, {**tensors, name: torch.ones(3)}), name)


@torch.no_grad()
def test_a_folded_frame_rate_equals_diffusers_skyreels(tmp_path: Path) -> None:
    from diffusers.models.transformers.transformer_skyreels_v2 import SkyReelsV2Transformer3DModel

    twin = SkyReelsV2Transformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        text_dim=24,
        freq_dim=32,
        ffn_dim=96,
        num_layers=2,
        num_frame_per_block=2,
        inject_sample_info=True,
    )
    randomise(twin, seed=5)
    twin.save_pretrained(tmp_path)
    opened = open_checkpoint(tmp_path, SourceConfig(overrides=SETTINGS))
    assert opened.family == "skyreels_diffusers"
    model, frames = build(opened), 6
    geometry = dataclasses.replace(opened.config.geometry, text_len=5)
    # One clip: with more, diffusers itself adds the frame rates in a wrong shape.
    latents, context = tiny_clip(dataclasses.replace(opened.config, geometry=geometry), frames, 1)
    timestep = torch.tensor([[7, 7, 800, 800, 30, 30]])
    mask = block_causal_mask(frames, 2, opened.config.tokens_per_frame)
    velocity = model(latents, timestep, context, torch.arange(frames), mask).transpose(1, 2)

    def theirs(rate: int) -> Tensor:
        return twin(
            latents.transpose(1, 2),
            timestep,
            context,
            enable_diffusion_forcing=True,
            fps=[rate],  # an index: 0 for 16 frames a second, 1 for any other
            return_dict=False,
        )[0]

    torch.testing.assert_close(velocity, theirs(1), atol=2e-5, rtol=0)
    assert (velocity - theirs(0)).abs().max() > 1e-2


# diffusers, in both directions


@torch.no_grad()
def assert_equal_outputs(ours: CausalWanModel, theirs: nn.Module) -> None:
    """Both models give the same velocity of one chunk."""
    config = ModelConfig(GEOMETRY, (4, 6), 4, CachePolicy(4), SamplerConfig())
    latents, _ = tiny_clip(config, 4)
    context, timestep = noise(2, 5, GEOMETRY.text_dim, seed=1), torch.tensor([700.0, 12.0])
    one = ours(latents, timestep[:, None].expand(2, 4), context, torch.arange(4))
    other = theirs(latents.transpose(1, 2), timestep, context, return_dict=False)[0]
    torch.testing.assert_close(one, other.transpose(1, 2), atol=2e-5, rtol=0)


@pytest.mark.parametrize("shards", [1, 3])
def test_diffusers_loads_native_tensors_under_its_names(shards: int, tmp_path: Path) -> None:
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    folder = write_diffusers(tmp_path, sane(), shards=shards) / "transformer"
    loaded: Any = WanTransformer3DModel.from_pretrained(folder, output_loading_info=True)
    twin, info = loaded
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_equal_outputs(build(open_checkpoint(folder)), twin)


@pytest.mark.parametrize("shard_size", ["10GB", "300KB"])
def test_what_diffusers_saves_opens_and_runs_the_same(shard_size: str, tmp_path: Path) -> None:
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    config = {k: v for k, v in diffusers_config().items() if not k.startswith("_")}
    twin = WanTransformer3DModel(**config)
    randomise(twin, seed=6)
    twin.save_pretrained(tmp_path / "a", max_shard_size=shard_size)
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > (shard_size == "300KB")
    opened = open_checkpoint(tmp_path / "a")
    assert (opened.family, opened.config.geometry) == ("diffusers", GEOMETRY)
    assert_equal_outputs(build(opened), twin)
    # Fused projections are saved twice, whole and in parts; the hint names diffusers' remedy.
    twin.fuse_qkv_projections()
    twin.save_pretrained(tmp_path / "fused")
    refused(tmp_path / "fused", "unfuse_qkv_projections()")


# Settings


def opened_config(path: Path, *settings: str, model: str | None = None) -> ModelConfig:
    overrides: dict[str, Any] = {}
    for setting in settings:
        override(overrides, setting)
    return open_checkpoint(path, SourceConfig(model=model, overrides=overrides)).config


TABLE = {
    "latent_size": [8, 8],
    "chunk_frames": 2,
    "cache": {"window_frames": 6, "sink_frames": 1, "frame_positions": "relative"},
    "sampler": {"denoising_step_list": [1000, 500], "shift": 3, "renoise": False},
    "media": "demo",
    "licence": "apache-2.0",
    "base_model": "Wan-AI/Wan2.1-T2V-1.3B",
    "frames_per_second": 12,
}


def test_a_table_in_config_json_overrides_the_defaults(tmp_path: Path) -> None:
    assert opened_config(small_wan(tmp_path / "a", native())) == ModelConfig(
        SMALL, (60, 104), 3, CachePolicy(21), SamplerConfig(), family="wan"
    )
    path = small_wan(tmp_path / "b", native(), {**SMALL_CONFIG, "vmla": TABLE})
    assert opened_config(path) == ModelConfig(
        SMALL,
        (8, 8),
        2,
        CachePolicy(6, 1, "relative"),
        SamplerConfig((1000, 500), 3.0, False),
        "demo",
        "wan",
        "apache-2.0",
        "Wan-AI/Wan2.1-T2V-1.3B",
        12,
    )
    assert TABLE.keys() == DEFAULTS.keys()


@pytest.fixture
def tiny_known(monkeypatch: pytest.MonkeyPatch) -> str:
    """A known model of the width of `SMALL`."""
    settings = {
        "chunk_frames": 4,
        "cache": {"window_frames": 12, "sink_frames": 3, "frame_positions": "relative"},
        "sampler": {"denoising_step_list": (1000, 800), "shift": 2.0},
        "licence": "other",
        "base_model": "someone/tiny",
    }
    monkeypatch.setitem(KNOWN, "tiny", KnownModel("Tiny", ("someone/tiny",), (48, 96), settings))
    return "tiny"


def test_config_json_overrides_a_known_model_and_the_user_both(
    tiny_known: str, tmp_path: Path
) -> None:
    table = {"cache": {"window_frames": 9}, "licence": "apache-2.0", "chunk_frames": 1}
    path = small_wan(tmp_path / "a", native())
    with_table = small_wan(tmp_path / "b", native(), {**SMALL_CONFIG, "vmla": table})

    config = opened_config(path, model=tiny_known)
    assert config.cache == CachePolicy(12, 3, "relative")
    assert config.sampler == SamplerConfig((1000, 800), 2.0, renoise=True)
    assert (config.chunk_frames, config.licence) == (4, "other")
    assert (config.latent_size, config.base_model) == ((60, 104), "someone/tiny")

    config = opened_config(with_table, model=tiny_known)
    assert config.cache == CachePolicy(9, 3, "relative")
    assert (config.chunk_frames, config.licence) == (1, "apache-2.0")

    typed = ("cache.frame_positions=absolute", "sampler.shift=4")
    typed += ("chunk_frames=2", "chunk_frames=5")
    config = opened_config(with_table, *typed, model=tiny_known)
    assert config.cache == CachePolicy(9, 3, "absolute")
    assert config.sampler == SamplerConfig((1000, 800), 4.0, renoise=True)
    assert (config.chunk_frames, config.licence) == (5, "apache-2.0")


def test_an_override_corrects_a_wrong_table(tmp_path: Path) -> None:
    table = {"cache": {"window_frames": 2}}
    path = small_wan(tmp_path, native(), {**SMALL_CONFIG, "vmla": table})
    assert opened_config(path, "chunk_frames=1").cache == CachePolicy(2)


def test_a_wrong_model_name_is_refused(tiny_known: str, tmp_path: Path) -> None:
    wide = dataclasses.replace(SMALL, dim=144)
    path = write_header(tmp_path, native_shapes(wide))
    write_json(path / "config.json", native_config(wide))
    how = SourceConfig(model=tiny_known)
    refused(path, "48 or 96", "144", "--model", how=how, kind=ConfigError)
    how = SourceConfig(model="self_forcing")
    refused(path, "'self_forcing'", "'self-forcing'", how=how, kind=ConfigError)


@pytest.mark.parametrize(
    ("table", "fact"),
    [
        ({"chunk_frame": 3}, "vmla.chunk_frame"),
        ({"geometry": {}}, "vmla.geometry"),
        ({"cache": {"window_frame": 3}}, "cache.window_frame"),
        ({"media": "vae"}, "media"),
        ({"chunk_frames": "3"}, "chunk_frames"),
        ({"cache": {"window_frames": 2}}, "window of 2"),
        ({"cache": 3}, "'cache'"),
        ([1], "'vmla'"),
    ],
)
def test_a_bad_table_is_refused(table: object, fact: str, tmp_path: Path) -> None:
    path = small_wan(tmp_path, native(), {**SMALL_CONFIG, "vmla": table})
    refused(path, fact, kind=CheckpointError if isinstance(table, list) else ConfigError)


@pytest.mark.parametrize(
    ("setting", "fact", "hint"),
    [
        ("chunk_frame=3", "model.chunk_frame", "'chunk_frames'"),
        ("geometry.dim=96", "model.geometry", "known: "),
        ("cache.window=12", "'cache.window'", "'window_frames'"),
        ("cache.frame_positions=relativ", "'relativ'", "'relative'"),
        ("cache=12", "'cache'", "--set"),
        ("chunk_frames=many", "'chunk_frames'", "--set"),
        ("chunk_frames=30", "30", "--set"),
        ("latent_size=[60]", "2 items", "--set"),
        ("cache.window_frames", "key=value", "--set"),
    ],
)
def test_a_bad_override_is_refused(setting: str, fact: str, hint: str, tmp_path: Path) -> None:
    path = small_wan(tmp_path, native())
    with pytest.raises(ConfigError) as caught:
        opened_config(path, "licence=apache-2.0", setting)
    assert fact in caught.value.message
    assert hint in caught.value.hint


# LoRAs


@pytest.mark.parametrize(
    ("model", "stated", "typed", "licence"),
    [
        ("other", {}, {}, "unknown"),
        ("other", {}, {"licence": "apache-2.0"}, "apache-2.0"),
        ("cc-by-nc-4.0", {"license": "apache-2.0"}, {}, "cc-by-nc-4.0"),
        ("cc-by-nc-4.0", {"modelspec.license": "CC-BY-NC-SA-4.0"}, {}, "cc-by-nc-sa-4.0"),
        ("cc-by-nc-4.0", {"license": "my own terms"}, {}, "unknown"),
    ],
)
def test_the_stricter_licence_of_model_and_lora_holds(
    model: str, stated: dict[str, str], typed: dict[str, Any], licence: str, tmp_path: Path
) -> None:
    path = write_longlive(tmp_path, sane())
    write_json(path.parent / "config.json", native_config(vmla={"licence": model}))
    lora = path.parent / "lora.safetensors"
    save_file(torch.load(path.parent / "lora.pt")["generator_lora"], lora, stated)
    assert opened_config(path).licence == model
    opened = open_checkpoint(path, SourceConfig(overrides=typed, loras=(str(lora),)))
    assert opened.config.licence == licence


def test_loras_add_up_by_their_scales(tmp_path: Path) -> None:
    path = write_longlive(tmp_path, sane())
    lora = path.parent / "lora.pt"
    how = SourceConfig(loras=(f"{lora}:0.5", f"{lora}:-1.5", str(lora)))
    opened, merged = open_checkpoint(path, how), with_lora(sane())
    assert [part.scale for part in opened.loras] == [0.5, -1.5, 1.0]
    for name, tensor in sane().items():
        torch.testing.assert_close(opened.read(name), tensor, atol=1e-6, rtol=1e-6)
    half = open_checkpoint(path, SourceConfig(loras=(f"{lora}:0.5",)))
    name = "blocks.1.cross_attn.o.weight"
    torch.testing.assert_close(half.read(name), (sane()[name] + merged[name]) / 2)


def test_a_lora_is_merged_into_projections_that_were_fused(tmp_path: Path) -> None:
    path = FORMS["Krea, fused"].write(tmp_path / "base", sane())
    write_longlive(tmp_path / "lora", sane())
    how = SourceConfig(loras=(str(tmp_path / "lora" / "models" / "lora.pt"),))
    opened, merged = open_checkpoint(path, how), with_lora(sane())
    assert all(torch.equal(opened.read(name), tensor) for name, tensor in merged.items())


def test_a_lora_is_merged_after_the_frame_rate(tmp_path: Path) -> None:
    path = write_skyreels(tmp_path / "base", sane())
    name = "time_projection.1"
    lora = {f"{name}.diff_b": torch.ones(6 * GEOMETRY.dim)}
    file = write_pickle(tmp_path / "lora.pt", lora)
    opened = open_checkpoint(path, SourceConfig(loras=(f"{file}:2",)))
    expected = with_frame_rate(sane())[f"{name}.bias"] + 2
    torch.testing.assert_close(opened.read(f"{name}.bias"), expected, atol=2e-6, rtol=1e-6)


# Incomplete and wrong checkpoints


def small_pickle(folder: Path, tensors: Tensors) -> Path:
    write_json(folder / "config.json", SMALL_CONFIG)
    return write_pickle(folder / "m.pt", {"generator_ema": wrap(tensors, "model.")})


def small_diffusers(folder: Path, tensors: Tensors) -> Path:
    return write_diffusers(folder, tensors, diffusers_config(SMALL))


WRITERS = {
    "wan": small_wan,
    "self_forcing": small_pickle,
    "diffusers": small_diffusers,
    "skyreels": lambda f, t: small_wan(f, t | frame_rate_tensors(SMALL.dim)),
    "skyreels_diffusers": lambda f, t: small_diffusers(f, t | frame_rate_tensors(SMALL.dim)),
}
EVERY_FAMILY = pytest.mark.parametrize("family", WRITERS)


@EVERY_FAMILY
def test_missing_and_extra_tensors_are_listed_and_refused(family: str, tmp_path: Path) -> None:
    gone = ("blocks.1.self_attn.v.bias", "head.modulation")
    path = WRITERS[family](tmp_path / "missing", without(native(), *gone))
    seen = recognise(path)
    assert (seen.family, seen.missing, seen.unknown) == (family, gone, ())
    assert seen.config.geometry.dim == 48
    refused(path, "2 tensors", *gone)

    odd = "condition_embedder.delta_embedder.weight"
    path = WRITERS[family](tmp_path / "extra", native())
    if path.suffix == ".pt":
        write_pickle(path, {"generator": wrap({**native(), odd: torch.ones(2)}, "model.")})
    else:
        (file,) = path.rglob("*.safetensors")
        save_file({**load_file(file), odd: torch.ones(2)}, file)
    seen = recognise(path)
    assert (seen.family, seen.missing, seen.unknown) == (family, (), (odd,))
    refused(path, "1 tensors", odd)


def test_blocks_beyond_the_last_are_extra(tmp_path: Path) -> None:
    renamed = {n.replace("blocks.1.", "blocks.7."): t for n, t in native().items()}
    path = small_wan(tmp_path / "b", renamed)
    seen = recognise(path)
    assert len(seen.missing) == len(seen.unknown) == 27
    assert all(name.startswith("blocks.1.") for name in seen.missing)
    refused(path, "27 tensors", "blocks.7.")
    fewer = {n: t for n, t in native().items() if not n.startswith("blocks.1.")}
    refused(small_wan(tmp_path / "a", fewer), "num_layers 2")


@pytest.mark.parametrize("name", native_shapes(dataclasses.replace(SMALL, num_layers=1)))
def test_every_tensor_is_required(name: str, tmp_path: Path) -> None:
    shapes = {n: shape for n, shape in native_shapes(SMALL).items() if n != name}
    path = write_header(tmp_path, shapes)
    write_json(path / "config.json", SMALL_CONFIG)
    # The family is recognised by one tensor.
    refused(path, "no known family" if name == "blocks.0.self_attn.k.weight" else name)


def test_the_number_of_heads_follows_from_wans_head_width(tmp_path: Path) -> None:
    path = write_header(tmp_path, native_shapes(dataclasses.replace(SMALL, dim=256)))
    assert open_checkpoint(path).config.geometry.num_heads == 2
    refused(write_header(tmp_path / "other", native_shapes(SMALL)), "num_heads")


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"dim": 64}, ["dim 64"]),
        ({"num_layers": 3}, ["num_layers 3"]),
        ({"patch_size": [1, 1, 1]}, ["patch_size"]),
        ({"num_heads": 5}, ["5 heads"]),
        ({"num_heads": 0}, ["0 heads"]),
        ({"num_heads": "2"}, ["'2' heads"]),
        ({"num_heads": 24}, ["head dim 2"]),
        ({"attention_head_dim": 12}, ["12"]),
        ({"eps": "small"}, ["eps"]),
        ({"text_len": 8.5}, ["text_len"]),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_refused(
    change: dict[str, Any], facts: list[str], tmp_path: Path
) -> None:
    refused(small_wan(tmp_path, native(), {**SMALL_CONFIG, **change}), *facts)


@pytest.mark.parametrize("text", ["{", "[1]", "\x00"])
def test_a_config_that_is_no_table_is_refused(text: str, tmp_path: Path) -> None:
    folder = small_wan(tmp_path, native())
    (folder / "config.json").write_text(text)
    refused(folder, "config.json", "JSON")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blocks.1.self_attn.k.weight", (48, 24)),
        ("head.head.weight", (17, 48)),
        ("patch_embedding.weight", (48, 4, 4)),
        ("patch_embedding.weight", (0, 4, 1, 2, 2)),
        ("time_embedding.0.weight", ()),
    ],
)
def test_misshapen_tensors_are_named(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    refused(small_wan(tmp_path, {**native(), name: torch.ones(shape)}), name)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("blocks.0.ffn.0.weight", torch.ones(96, 48).to(torch.float8_e4m3fn)),
        ("blocks.0.ffn.0.weight", torch.ones(96, 48, dtype=torch.uint8)),
        ("blocks.0.ffn.0.quantized_weight_values", torch.ones(3)),
        ("blocks.0.ffn.0.weight_scale", torch.ones(1)),
        ("scaled_fp8", torch.ones(1)),
    ],
)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_quantised_files_are_refused_by_name(
    prefix: str, name: str, tensor: torch.Tensor, tmp_path: Path
) -> None:
    refused(small_wan(tmp_path, wrap({**native(), name: tensor}, prefix)), "quantised", name)


@EVERY_FAMILY
def test_image_to_video_is_refused_as_such(family: str, tmp_path: Path) -> None:
    for name in ("img_emb.proj.0.weight", "blocks.1.cross_attn.k_img.bias"):
        tensors = {**native(), name: torch.ones(48)}
        refused(WRITERS[family](tmp_path / name, tensors), "image-to-video", name)
    wide = native(dataclasses.replace(SMALL, in_dim=9))
    refused(WRITERS[family](tmp_path / "wide", wide), "image-to-video", "9")


def test_other_models_are_of_no_known_family(tmp_path: Path) -> None:
    save_file({"encoder.conv.weight": torch.ones(3)}, tmp_path / "vae.safetensors")
    refused(tmp_path, "encoder.conv.weight", *(family.name for family in FAMILIES))


# Converted folders

MLA = dataclasses.replace(MODEL, mla=MLAConfig((6, 8), ((0, 5), (1, 2)), "calibrated"))


def write_vmla(folder: Path, tensors: Tensors, config: ModelConfig = MLA) -> Path:
    write_checkpoint(
        folder, tensors, {"config.json": converted_config(config)}, one_file_bytes=40_000
    )
    return folder


def converted() -> Tensors:
    kept = {n: t for n, t in native().items() if ".self_attn.v." not in n}
    latent = {f"blocks.{i}.self_attn.kv_a_proj.weight": torch.ones(6, 48) for i in (0, 1)}
    return {**kept, **latent}


def test_a_converted_folder_keeps_its_own_attention_tensors(tmp_path: Path) -> None:
    opened = open_checkpoint(write_vmla(tmp_path / "f", converted()))
    assert (opened.family, opened.config) == ("vmla", MLA)
    assert all(torch.equal(opened.read(name), tensor) for name, tensor in converted().items())
    with pytest.raises(CheckpointError, match=r"blocks\.0\.self_attn\.v\.weight") as caught:
        opened.read("blocks.0.self_attn.v.weight")
    assert caught.value.hint


def test_a_converted_folder_is_checked_outside_its_attention(tmp_path: Path) -> None:
    missing = without(converted(), "blocks.1.ffn.2.bias")
    refused(write_vmla(tmp_path / "a", missing), "blocks.1.ffn.2.bias")
    extra = {**converted(), "blocks.9.self_attn.kv_a_proj.weight": torch.ones(1)}
    refused(write_vmla(tmp_path / "b", extra), "blocks.9.self_attn")
    dense = {**native(), "blocks.0.self_attn.kv_a_proj.weight": torch.ones(6, 48)}
    refused(write_vmla(tmp_path / "c", dense, MODEL), "kv_a_proj")


def test_a_converted_folder_takes_no_other_settings(tmp_path: Path) -> None:
    path = write_vmla(tmp_path / "f", converted())
    for how in (
        SourceConfig(model="self-forcing"),
        SourceConfig(overrides={"chunk_frames": 1}),
        SourceConfig(loras=("lora.pt",)),
    ):
        refused(path, str(path), "cache.*", how=how, kind=ConfigError)


@pytest.mark.parametrize(
    ("change", "fact"),
    [({"version": 2}, "version 2"), ({"model": None}, "table"), ({"model": {"g": 1}}, "'g'")],
)
def test_a_converted_config_is_read_strictly(
    change: dict[str, Any], fact: str, tmp_path: Path
) -> None:
    folder = write_vmla(tmp_path / "f", converted())
    write_json(folder / "config.json", {**converted_config(MLA), **change})
    refused(folder, fact)

"""One model in every family's exact form is the same native model; what is not whole is named."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import chunk_timesteps, noise, randomise, tiny_clip, tiny_model
from family_files import (
    FORMS,
    GEOMETRY,
    Form,
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

from vmla_convert.checkpoint.families import (
    FAMILIES,
    OpenCheckpoint,
    open_checkpoint,
    recognise,
)
from vmla_convert.checkpoint.geometry import native_shapes
from vmla_convert.checkpoint.keymap import TEXT_TO_VIDEO, fill
from vmla_convert.checkpoint.known import KNOWN, KnownModel
from vmla_convert.checkpoint.licences import read_licence
from vmla_convert.checkpoint.settings import DEFAULTS, converted_config
from vmla_convert.checkpoint.writer import write_checkpoint
from vmla_convert.config import (
    CachePolicy,
    ConvertConfig,
    Geometry,
    MLAConfig,
    ModelConfig,
    SamplerConfig,
    SourceConfig,
)
from vmla_convert.errors import CheckpointError, ConfigError, VmlaError
from vmla_convert.fitting.convert import convert
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.loading.load import build, load

# For tests of what is read, not of what comes out.
SMALL = dataclasses.replace(GEOMETRY, dim=48, num_heads=2, in_dim=4, out_dim=4, text_len=8)
SMALL_CONFIG = native_config(SMALL)
MODEL = ModelConfig(SMALL, (8, 8), 2, CachePolicy(6, 1, "relative"), SamplerConfig(), "demo")
# Frames of two by three tokens.
SETTINGS = ("latent_size=[4, 6]", "chunk_frames=2", "cache.window_frames=6", "cache.sink_frames=1")
SPECTRAL = ConvertConfig("mla", init="spectral", kv_lora_rank=24)


@cache
def native(geometry: Geometry = SMALL) -> Tensors:
    """Random weights; callers copy before they change any."""
    return {
        n: noise(*shape, seed=i) for i, (n, shape) in enumerate(native_shapes(geometry).items())
    }


@cache
def sane() -> Tensors:
    """Weights that keep signals about their size, for models that are run."""
    config = ModelConfig(GEOMETRY, (4, 6), 2, CachePolicy(6, 1), SamplerConfig())
    return dict(tiny_model(config).state_dict())


def small_wan(folder: Path, tensors: Tensors, config: object = SMALL_CONFIG) -> Path:
    return write_wan(folder, tensors, config)


def output(model: CausalWanModel) -> Tensor:
    """Velocities of a clip of three chunks, each seeing those before it."""
    config, frames = model.config, 6
    geometry = dataclasses.replace(config.geometry, text_len=5)
    config = dataclasses.replace(config, geometry=geometry, latent_size=(4, 6))
    latents, context = tiny_clip(config, frames)
    mask = block_causal_mask(frames, 2, config.tokens_per_frame, CachePolicy(4, 1))
    timestep = chunk_timesteps(dataclasses.replace(config, chunk_frames=2), frames)
    with torch.no_grad():
        return model(latents, timestep, context, torch.arange(frames), mask)


class Expected(NamedTuple):
    """A native model: its tensors, what it gives, and what its conversion gives."""

    tensors: Tensors
    output: Tensor
    converted: Tensor


@pytest.fixture(scope="module")
def expect(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Form], Expected]:
    """Made once for each native model that forms stand for."""

    @cache
    def made(of: Callable[[Tensors], Tensors]) -> Expected:
        folder, tensors = tmp_path_factory.mktemp("native"), of(sane())
        source = SourceConfig(str(write_wan(folder / "wan", tensors)), overrides=SETTINGS)
        convert(source, folder / "converted", SPECTRAL)
        return Expected(tensors, output(load(source)), output(load(folder / "converted")))

    return lambda form: made(form.is_equal_to)


class Written(NamedTuple):
    form: Form
    source: SourceConfig
    opened: OpenCheckpoint


@pytest.fixture(scope="module", params=FORMS)
def written(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Written]:
    """A checkpoint of each form, and how a user would name it."""
    form = FORMS[request.param]
    path = form.write(tmp_path_factory.mktemp("form"), sane())
    loras = (str(path.parent / form.lora),) if form.lora else ()
    source = SourceConfig(str(path), key=form.key, overrides=SETTINGS, loras=loras)
    yield Written(form, source, open_checkpoint(path, source))


def assert_same(form: Form, found: Tensor, expected: Tensor, slack: float = 1) -> None:
    """Bit for bit; but the frame rate's share of a bias is summed in an order of its own."""
    near = 2e-6 * slack if "skyreels" in form.family else 0
    torch.testing.assert_close(found, expected, atol=near, rtol=near)


# Families


def test_every_form_is_recognised_and_whole(written: Written) -> None:
    opened = written.opened
    assert opened.family == opened.config.family == written.form.family
    assert (opened.unknown, opened.missing) == ((), ())
    # diffusers does not say how long prompts are: Wan's length.
    assert opened.config.geometry == GEOMETRY


def test_every_form_reads_back_as_the_same_native_tensors(
    written: Written, expect: Callable[[Form], Expected]
) -> None:
    opened, expected = written.opened, expect(written.form).tensors
    assert opened.names.keys() == opened.specs().keys() == expected.keys()
    for name, tensor in expected.items():
        assert_same(written.form, opened.read(name), tensor)
        assert opened.specs()[name].shape == tuple(tensor.shape)
    assert opened.parameters() == sum(tensor.numel() for tensor in expected.values())


def test_every_form_runs_as_the_native_model(
    written: Written, expect: Callable[[Form], Expected]
) -> None:
    expected = expect(written.form).output
    assert_same(written.form, output(build(written.opened)), expected, slack=20)
    assert (expect(FORMS["Wan"]).output - expect(FORMS["Wan 2.2, low noise"]).output).std() > 0.1


def test_every_form_converts_as_the_native_model(
    written: Written, expect: Callable[[Form], Expected], tmp_path: Path
) -> None:
    expected = expect(written.form)
    convert(written.source, tmp_path / "out", SPECTRAL)
    converted = load(tmp_path / "out")
    assert_same(written.form, output(converted), expected.converted, slack=50)
    assert converted.config.family == written.form.family
    assert not torch.allclose(expected.output, expected.converted, atol=1e-3)


def test_every_family_has_a_form() -> None:
    assert {form.family for form in FORMS.values()} == {family.name for family in FAMILIES}


def test_a_converted_folder_is_of_its_own_family(tmp_path: Path) -> None:
    opened = open_checkpoint(write_vmla(tmp_path / "f", native()))
    assert opened.family == "vmla"
    assert all(torch.equal(opened.read(name), tensor) for name, tensor in native().items())


def test_experts_are_opened_by_their_own_paths_only(tmp_path: Path) -> None:
    folder = write_a14b(tmp_path, native())
    error = refused(folder, "high_noise_model, low_noise_model")
    assert all(str(folder / name) in error.hint for name in ("high_noise_model", "low_noise_model"))


def test_an_average_is_taken_before_the_model_that_was_averaged(tmp_path: Path) -> None:
    path, name = write_rolling_forcing(tmp_path, sane()), "blocks.1.ffn.0.weight"
    for key, sign in ((None, 1), ("generator_ema", 1), ("generator", -1)):
        opened = open_checkpoint(path, SourceConfig(key=key))
        assert torch.equal(opened.read(name), sign * sane()[name])
        assert opened.source.key == (key or "generator_ema")
    assert "generator, generator_ema" in refused(path, "'critic'", SourceConfig(key="critic")).hint


@pytest.mark.parametrize(
    ("channels", "latent_size"), [(16, (60, 104)), (48, (44, 80)), (4, (60, 104))]
)
def test_wan_22s_vae_has_smaller_frames(
    channels: int, latent_size: tuple[int, int], tmp_path: Path
) -> None:
    geometry = dataclasses.replace(GEOMETRY, in_dim=channels, out_dim=channels)
    path = write_header(tmp_path, native_shapes(geometry))
    assert open_checkpoint(path).config.latent_size == latent_size
    told = open_checkpoint(path, SourceConfig(overrides=("latent_size=[8, 8]",)))
    assert told.config.latent_size == (8, 8)


RELEASED = {
    "self-forcing": Geometry(1536, 8960, 12, 30, 16, 16),
    "krea-realtime": Geometry(5120, 13824, 40, 40, 16, 16),
    "longlive-2": Geometry(3072, 14336, 24, 30, 48, 48),
}


@pytest.mark.parametrize(
    ("model", "tensors", "parameters"),
    [
        ("self-forcing", 825, 1_418_996_800),
        ("krea-realtime", 1095, 14_288_491_584),
        ("longlive-2", 825, 4_999_787_712),
    ],
)
def test_released_sizes_open_by_their_headers(
    model: str, tensors: int, parameters: int, tmp_path: Path
) -> None:
    """Files of as many zeros, which no disk holds: opening reads none of them."""
    geometry, known = RELEASED[model], KNOWN[model]
    path = write_header(tmp_path, native_shapes(geometry))
    opened = open_checkpoint(path, SourceConfig(model=model))
    assert len(opened.names) == tensors
    assert opened.parameters() == parameters
    assert opened.config.geometry == geometry
    assert opened.known == model
    assert opened.config.cache.window_frames == known.settings["cache"]["window_frames"]
    assert opened.config.cache.sink_frames == known.settings["cache"]["sink_frames"]
    assert opened.config.chunk_frames == known.settings["chunk_frames"]
    assert opened.config.base_model == known.repos[0]


def test_shapes_and_rules_speak_of_the_same_tensors() -> None:
    filled = {fill(rule.native, i) for rule in TEXT_TO_VIDEO for i in range(GEOMETRY.num_layers)}
    assert native_shapes(GEOMETRY).keys() == filled


# Frame rates


def test_a_frame_rate_is_in_a_bias_and_nowhere_else(tmp_path: Path) -> None:
    plain, opened = sane(), open_checkpoint(write_skyreels(tmp_path, sane()))
    differ = {name for name in plain if not torch.equal(opened.read(name), plain[name])}
    assert differ == {"time_projection.1.bias"}


def test_a_model_knows_its_frames_per_second(tmp_path: Path) -> None:
    """Wan 2.1 makes 16; SkyReels-V2, and what reads Wan 2.2's other VAE, make 24."""
    wide = dataclasses.replace(SMALL, in_dim=48, out_dim=48)
    rates = [
        open_checkpoint(path).config.frames_per_second
        for path in (
            small_wan(tmp_path / "wan", native()),
            small_wan(tmp_path / "wide", native(wide), native_config(wide)),
            write_skyreels(tmp_path / "skyreels", sane()),
            write_skyreels_diffusers(tmp_path / "other", sane()),
        )
    ]
    assert rates == [16, 24, 24, 24]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_frame_rate_is_added_in_float32_and_rounded_once(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    low = {name: tensor.to(dtype) for name, tensor in (sane() | frame_rate_tensors()).items()}
    write_json(tmp_path / "config.json", native_config())
    opened = open_checkpoint(write_weights(tmp_path, low))
    name = "time_projection.1.bias"
    exact = {n: t.double() for n, t in low.items()}
    x = exact["fps_embedding.weight"][1]
    for part in ("0", "2"):
        x = exact[f"fps_projection.{part}.weight"] @ x + exact[f"fps_projection.{part}.bias"]
        x = nn.functional.silu(x) if part == "0" else x
    assert opened.read(name).dtype == dtype == opened.specs()[name].dtype
    assert torch.equal(opened.read(name), (exact[name] + x).to(dtype))


@pytest.mark.parametrize("name", frame_rate_tensors())
def test_a_frame_rate_must_be_whole(name: str, tmp_path: Path) -> None:
    """Without the mark of its family, the rest is no part of the model."""
    tensors = {n: t for n, t in (native() | frame_rate_tensors(SMALL.dim)).items() if n != name}
    names = r"fps_projection\.0\.bias" if name == "fps_embedding.weight" else name
    refused(small_wan(tmp_path, tensors), names)
    bent = native() | frame_rate_tensors(SMALL.dim)
    refused(small_wan(tmp_path, {**bent, name: torch.ones(3)}), name)


@torch.no_grad()
def test_a_folded_frame_rate_is_diffusers_skyreels(tmp_path: Path) -> None:
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


# diffusers, there and back


def diffusers_output(twin: nn.Module) -> Tensor:
    """As `output`, for one chunk of any model of diffusers."""
    config = ModelConfig(GEOMETRY, (4, 6), 4, CachePolicy(4), SamplerConfig())
    latents, _ = tiny_clip(config, 4)
    context = noise(2, 5, GEOMETRY.text_dim, seed=1)
    with torch.no_grad():
        return twin(
            latents.transpose(1, 2), torch.tensor([700.0, 12.0]), context, return_dict=False
        )[0].transpose(1, 2)


def one_chunk_output(model: CausalWanModel) -> Tensor:
    config = ModelConfig(GEOMETRY, (4, 6), 4, CachePolicy(4), SamplerConfig())
    latents, _ = tiny_clip(config, 4)
    context, timestep = noise(2, 5, GEOMETRY.text_dim, seed=1), torch.tensor([[700.0], [12.0]])
    with torch.no_grad():
        return model(latents, timestep.expand(2, 4), context, torch.arange(4))


@pytest.mark.parametrize("shards", [1, 3])
def test_diffusers_loads_native_tensors_under_its_names(shards: int, tmp_path: Path) -> None:
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    folder = write_diffusers(tmp_path, sane(), shards=shards) / "transformer"
    loaded: Any = WanTransformer3DModel.from_pretrained(folder, output_loading_info=True)
    twin, told = loaded
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours = build(open_checkpoint(folder))
    torch.testing.assert_close(one_chunk_output(ours), diffusers_output(twin), atol=2e-5, rtol=0)


@pytest.mark.parametrize("shard_size", ["10GB", "300KB"])
def test_what_diffusers_saves_opens_and_runs_the_same(shard_size: str, tmp_path: Path) -> None:
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    config = diffusers_config()
    twin = WanTransformer3DModel(**{k: v for k, v in config.items() if not k.startswith("_")})
    randomise(twin, seed=6)
    twin.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert len(list(tmp_path.glob("*.safetensors"))) > (shard_size == "300KB")
    opened = open_checkpoint(tmp_path)
    assert (opened.family, opened.config.geometry) == ("diffusers", GEOMETRY)
    ours = build(opened)
    torch.testing.assert_close(one_chunk_output(ours), diffusers_output(twin), atol=2e-5, rtol=0)


def test_fused_projections_that_diffusers_saves_twice_are_refused(tmp_path: Path) -> None:
    """It keeps the parts beside the whole; the hint names its own way out."""
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    config = {k: v for k, v in diffusers_config().items() if not k.startswith("_")}
    twin = WanTransformer3DModel(**config)
    twin.fuse_qkv_projections()
    twin.save_pretrained(tmp_path / "fused")
    assert "unfuse_qkv_projections()" in refused(tmp_path / "fused", r"to_k?q?k?v\.").hint
    twin.unfuse_qkv_projections()
    twin.save_pretrained(tmp_path / "apart")
    assert open_checkpoint(tmp_path / "apart").family == "diffusers"


# Settings


def test_without_settings_the_rest_is_as_released(tmp_path: Path) -> None:
    config = open_checkpoint(small_wan(tmp_path, native())).config
    assert config == ModelConfig(
        SMALL, (60, 104), 3, CachePolicy(21), SamplerConfig(), family="wan"
    )


TABLE = {
    "latent_size": [8, 8],
    "chunk_frames": 2,
    "cache": {"window_frames": 6, "sink_frames": 1, "positions": "relative"},
    "sampler": {"denoising_step_list": [1000, 500], "shift": 3, "renoise": False},
    "media": "demo",
    "licence": "apache-2.0",
    "base_model": "Wan-AI/Wan2.1-T2V-1.3B",
    "frames_per_second": 12,
}


def test_a_table_in_config_json_gives_the_rest(tmp_path: Path) -> None:
    path = small_wan(tmp_path, native(), {**SMALL_CONFIG, "vmla": TABLE})
    assert open_checkpoint(path).config == ModelConfig(
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
        "cache": {"window_frames": 12, "sink_frames": 3, "positions": "relative"},
        "sampler": {"denoising_step_list": (1000, 800), "shift": 2.0},
        "licence": "other",
        "base_model": "someone/tiny",
    }
    monkeypatch.setitem(KNOWN, "tiny", KnownModel("Tiny", ("someone/tiny",), (48, 96), settings))
    return "tiny"


def opened_config(path: Path, *overrides: str, model: str | None = None) -> ModelConfig:
    return open_checkpoint(path, SourceConfig(model=model, overrides=overrides)).config


def test_a_known_model_gives_way_to_config_json_and_both_to_the_user(
    tiny_known: str, tmp_path: Path
) -> None:
    told = {"cache": {"window_frames": 9}, "licence": "apache-2.0", "chunk_frames": 1}
    path = small_wan(tmp_path / "a", native())
    told_path = small_wan(tmp_path / "b", native(), {**SMALL_CONFIG, "vmla": told})

    config = opened_config(path, model=tiny_known)
    assert config.cache == CachePolicy(12, 3, "relative")
    assert config.sampler == SamplerConfig((1000, 800), 2.0, renoise=True)
    assert (config.chunk_frames, config.licence) == (4, "other")
    assert (config.latent_size, config.base_model) == ((60, 104), "someone/tiny")

    config = opened_config(told_path, model=tiny_known)
    assert config.cache == CachePolicy(9, 3, "relative")
    assert (config.chunk_frames, config.licence) == (1, "apache-2.0")
    assert config.base_model == "someone/tiny"

    config = opened_config(
        told_path,
        "cache.positions=absolute",
        "sampler.shift=4",
        "chunk_frames=2",
        "chunk_frames=5",
        model=tiny_known,
    )
    assert config.cache == CachePolicy(9, 3, "absolute")
    assert config.sampler == SamplerConfig((1000, 800), 4.0, renoise=True)
    assert (config.chunk_frames, config.licence) == (5, "apache-2.0")


def test_an_override_mends_what_a_table_gets_wrong(tmp_path: Path) -> None:
    table = {"cache": {"window_frames": 2}}
    path = small_wan(tmp_path, native(), {**SMALL_CONFIG, "vmla": table})
    assert opened_config(path, "chunk_frames=1").cache == CachePolicy(2)


def test_a_known_model_is_of_its_own_width(tiny_known: str, tmp_path: Path) -> None:
    wide = dataclasses.replace(SMALL, dim=144)
    path = write_header(tmp_path, native_shapes(wide))
    write_json(path / "config.json", native_config(wide))
    error = refused(path, "48 or 96.* 144", SourceConfig(model=tiny_known), ConfigError)
    assert "--model" in error.hint


def test_an_unknown_model_is_refused_with_the_nearest(tmp_path: Path) -> None:
    how = SourceConfig(model="self_forcing")
    error = refused(small_wan(tmp_path, native()), "self_forcing", how, ConfigError)
    assert "'self-forcing'" in error.hint


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"chunk_frame": 3}, r"vmla\.chunk_frame"),
        ({"geometry": {}}, r"vmla\.geometry"),
        ({"family": "wan"}, r"vmla\.family"),
        ({"cache": {"window_frame": 3}}, r"cache\.window_frame"),
        ({"media": "vae"}, "media"),
        ({"chunk_frames": "3"}, "chunk_frames"),
        ({"cache": {"window_frames": 2}}, "no room"),
        ({"cache": {"sink_frames": 20}}, "no room"),
        ({"cache": 3}, "'cache' must be a table"),
        ([1], "not a table"),
    ],
)
def test_a_bad_table_is_refused(table: object, message: str, tmp_path: Path) -> None:
    path = small_wan(tmp_path, native(), {**SMALL_CONFIG, "vmla": table})
    kind = CheckpointError if isinstance(table, list) else ConfigError
    refused(path, message, kind=kind)


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        ("chunk_frame=3", "'chunk_frame' in --set", "'chunk_frames'"),
        ("geometry.dim=96", "'geometry' in --set", "known: "),
        ("cache.window=12", r"'cache\.window'", "'window_frames'"),
        ("cache.positions=relativ", "'relativ'", "'relative'"),
        ("cache=12", "'cache' must be a table", "--set"),
        ("chunk_frames=many", "'chunk_frames' must be int", "--set"),
        ("chunk_frames=30", "no room for a chunk of 30", "--set"),
        ("cache.sink_frames=21", "a sink of 21", "--set"),
        ("latent_size=[60]", "must have 2 items", "--set"),
        ("licence=2", "'licence' must be str", "--set"),
        ("cache.window_frames", "key=value", "--set"),
    ],
)
def test_a_bad_override_is_refused(override: str, message: str, hint: str, tmp_path: Path) -> None:
    """By its own name: config.json is not at fault."""
    how = SourceConfig(overrides=("licence=apache-2.0", override))
    error = refused(small_wan(tmp_path, native()), message, how, ConfigError)
    assert hint in error.hint
    assert "config.json" not in error.message


def test_a_converted_folder_takes_no_settings(tmp_path: Path) -> None:
    path = write_vmla(tmp_path / "f", native())
    for how in (
        SourceConfig(model="self-forcing"),
        SourceConfig(overrides=("chunk_frames=1",)),
        SourceConfig(loras=("lora.pt",)),
    ):
        refused(path, "converted already", how, ConfigError)


# LoRAs


@pytest.mark.parametrize(
    ("overrides", "licence"), [((), "unknown"), (("licence=apache-2.0",), "apache-2.0")]
)
def test_a_lora_makes_the_licence_unknown(
    overrides: tuple[str, ...], licence: str, tmp_path: Path
) -> None:
    path = write_longlive(tmp_path, sane())
    write_json(path.parent / "config.json", native_config(vmla={"licence": "other"}))
    lora = str(path.parent / "lora.pt")
    assert opened_config(path).licence == "other"
    config = open_checkpoint(path, SourceConfig(overrides=overrides, loras=(lora,))).config
    assert config.licence == licence


@pytest.mark.parametrize(
    ("stated", "licence"),
    [
        ({"license": "apache-2.0"}, "cc-by-nc-4.0"),
        ({"modelspec.license": "CC-BY-NC-SA-4.0"}, "cc-by-nc-sa-4.0"),
        ({"license": "my own terms"}, "unknown"),
        ({}, "unknown"),
    ],
)
def test_the_stricter_licence_of_model_and_lora_holds(
    stated: dict[str, str], licence: str, tmp_path: Path
) -> None:
    path = write_longlive(tmp_path, sane())
    write_json(path.parent / "config.json", native_config(vmla={"licence": "cc-by-nc-4.0"}))
    lora = path.parent / "lora.safetensors"
    save_file(torch.load(path.parent / "lora.pt")["generator_lora"], lora, stated)
    opened = open_checkpoint(path, SourceConfig(loras=(str(lora),)))
    assert opened.config.licence == licence
    assert opened.loras[0].licence == read_licence(next(iter(stated.values()), None))


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


# What is not whole


def refused(
    path: Path,
    message: str,
    how: SourceConfig | None = None,
    kind: type[VmlaError] = CheckpointError,
) -> VmlaError:
    with pytest.raises(kind, match=message) as caught:
        open_checkpoint(path, how)
    assert caught.value.hint
    assert not caught.value.message.endswith(".")
    return caught.value


def small_pickle(folder: Path, tensors: Tensors) -> Path:
    write_json(folder / "config.json", SMALL_CONFIG)
    return write_pickle(folder / "m.pt", {"generator_ema": wrap(tensors, "model.")})


def small_diffusers(folder: Path, tensors: Tensors) -> Path:
    return write_diffusers(folder, tensors, diffusers_config(SMALL))


def small_skyreels(folder: Path, tensors: Tensors) -> Path:
    return small_wan(folder, tensors | frame_rate_tensors(SMALL.dim))


def small_skyreels_diffusers(folder: Path, tensors: Tensors) -> Path:
    return small_diffusers(folder, tensors | frame_rate_tensors(SMALL.dim))


WRITERS = {
    "wan": small_wan,
    "self_forcing": small_pickle,
    "diffusers": small_diffusers,
    "skyreels": small_skyreels,
    "skyreels_diffusers": small_skyreels_diffusers,
}
EVERY_FAMILY = pytest.mark.parametrize("family", WRITERS)


@EVERY_FAMILY
def test_missing_tensors_are_listed_and_refused(family: str, tmp_path: Path) -> None:
    gone = ("blocks.1.self_attn.v.bias", "head.modulation")
    tensors = {name: tensor for name, tensor in native().items() if name not in gone}
    path = WRITERS[family](tmp_path, tensors)
    seen = recognise(path)
    assert (seen.family, seen.missing, seen.unknown) == (family, gone, ())
    assert seen.config.geometry.dim == 48
    refused(path, r"lacks 2 tensors: blocks\.1\.self_attn\.v\.bias, head\.modulation$")


@EVERY_FAMILY
def test_extra_tensors_are_listed_and_refused(family: str, tmp_path: Path) -> None:
    odd = "condition_embedder.delta_embedder.weight"
    path = WRITERS[family](tmp_path, native())
    if path.suffix == ".pt":
        write_pickle(path, {"generator": wrap({**native(), odd: torch.ones(2)}, "model.")})
    else:
        (file,) = path.rglob("*.safetensors")
        save_file({**load_file(file), odd: torch.ones(2)}, file)
    seen = recognise(path)
    assert (seen.family, seen.missing, seen.unknown) == (family, (), (odd,))
    refused(path, rf"1 tensors .*{odd}$")


def test_blocks_beyond_the_last_are_extra(tmp_path: Path) -> None:
    renamed = {n.replace("blocks.1.", "blocks.7."): t for n, t in native().items()}
    path = small_wan(tmp_path / "b", renamed)
    seen = recognise(path)
    assert len(seen.missing) == len(seen.unknown) == 27
    assert all(name.startswith("blocks.1.") for name in seen.missing)
    assert all(name.startswith("blocks.7.") for name in seen.unknown)
    refused(path, r"27 tensors .*blocks\.7\.")
    fewer = {n: t for n, t in native().items() if not n.startswith("blocks.1.")}
    refused(small_wan(tmp_path / "a", fewer), "num_layers 2")


@pytest.mark.parametrize("name", native_shapes(dataclasses.replace(SMALL, num_layers=1)))
def test_every_tensor_is_required(name: str, tmp_path: Path) -> None:
    shapes = {n: shape for n, shape in native_shapes(SMALL).items() if n != name}
    path = write_header(tmp_path, shapes)
    write_json(path / "config.json", SMALL_CONFIG)
    # Without the tensor that detection goes by, the family is unknown.
    refused(path, "no known family" if name == "blocks.0.self_attn.k.weight" else name)


def test_heads_follow_from_the_width_when_it_is_wans(tmp_path: Path) -> None:
    wide = dataclasses.replace(SMALL, dim=256)
    path = write_header(tmp_path, native_shapes(wide))
    assert open_checkpoint(path).config.geometry.num_heads == 2


def test_heads_that_nobody_tells_are_asked_for(tmp_path: Path) -> None:
    path = write_header(tmp_path, native_shapes(SMALL))
    assert "num_heads" in refused(path, "how many heads").hint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 64}, "dim 64"),
        ({"num_layers": 3}, "num_layers 3"),
        ({"patch_size": [1, 1, 1]}, "patch_size"),
        ({"num_heads": 5}, "5 heads"),
        ({"num_heads": 0}, "0 heads"),
        ({"num_heads": "2"}, "'2' heads"),
        ({"num_heads": 24}, "head dim 2"),
        ({"attention_head_dim": 12}, "width 12"),
        ({"eps": "small"}, "eps"),
        ({"text_len": 8.5}, "text_len"),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    refused(small_wan(tmp_path, native(), {**SMALL_CONFIG, **change}), message)


@pytest.mark.parametrize("text", ["{", "[1]", "\x00"])
def test_a_config_that_is_no_table_is_refused(text: str, tmp_path: Path) -> None:
    folder = small_wan(tmp_path, native())
    (folder / "config.json").write_text(text)
    refused(folder, "JSON")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blocks.1.self_attn.k.weight", (48, 24)),
        ("blocks.0.norm3.bias", (1, 48)),
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
        ("blocks.0.ffn.0.scale_weight", torch.ones(1)),
        ("scaled_fp8", torch.ones(1)),
    ],
)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_quantised_files_are_refused_by_name(
    prefix: str, name: str, tensor: torch.Tensor, tmp_path: Path
) -> None:
    tensors = wrap({**native(), name: tensor}, prefix)
    refused(small_wan(tmp_path, tensors), rf"quantised: ({prefix})?{name}")


@EVERY_FAMILY
def test_image_to_video_is_refused_as_such(family: str, tmp_path: Path) -> None:
    message = "image-to-video checkpoints are not supported yet"
    for name in ("img_emb.proj.0.weight", "blocks.1.cross_attn.k_img.bias"):
        tensors = {**native(), name: torch.ones(48)}
        refused(WRITERS[family](tmp_path / name, tensors), message)
    wide = native(dataclasses.replace(SMALL, in_dim=9))
    refused(WRITERS[family](tmp_path / "wide", wide), message)


def test_other_models_are_of_no_known_family(tmp_path: Path) -> None:
    save_file({"encoder.conv.weight": torch.ones(3)}, tmp_path / "vae.safetensors")
    error = refused(tmp_path, r"no known family; it holds encoder\.conv\.weight")
    assert all(family.name in error.hint for family in FAMILIES)


# Converted folders

MLA = dataclasses.replace(MODEL, mla=MLAConfig((6, 8), ((0, 5), (1, 2)), "calibrated"))


def write_vmla(folder: Path, tensors: Tensors, config: ModelConfig = MODEL) -> Path:
    write_checkpoint(
        folder, tensors, {"config.json": converted_config(config)}, one_file_bytes=40_000
    )
    return folder


def converted() -> Tensors:
    kept = {n: t for n, t in native().items() if ".self_attn.v." not in n}
    latent = {f"blocks.{i}.self_attn.kv_a_proj.weight": torch.ones(6, 48) for i in (0, 1)}
    return {**kept, **latent}


def test_a_converted_folder_keeps_its_own_attention_tensors(tmp_path: Path) -> None:
    opened = open_checkpoint(write_vmla(tmp_path / "f", converted(), MLA))
    assert (opened.family, opened.config) == ("vmla", MLA)
    assert torch.equal(opened.read("blocks.1.self_attn.kv_a_proj.weight"), torch.ones(6, 48))
    with pytest.raises(
        CheckpointError, match=r"no tensor 'blocks\.0\.self_attn\.v\.weight'"
    ) as caught:
        opened.read("blocks.0.self_attn.v.weight")
    assert caught.value.hint


def test_a_converted_folder_is_checked_beside_its_attention(tmp_path: Path) -> None:
    missing = converted()
    del missing["blocks.1.ffn.2.bias"]
    refused(write_vmla(tmp_path / "a", missing, MLA), r"blocks\.1\.ffn\.2\.bias")
    extra = {**converted(), "blocks.9.self_attn.kv_a_proj.weight": torch.ones(1)}
    refused(write_vmla(tmp_path / "b", extra, MLA), r"blocks\.9\.self_attn")
    dense = {**native(), "blocks.0.self_attn.kv_a_proj.weight": torch.ones(6, 48)}
    refused(write_vmla(tmp_path / "c", dense, MODEL), "kv_a_proj")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "format version 2"),
        ({"model": None}, "must be a table"),
        ({"model": {"geometri": {}}}, "geometri"),
    ],
)
def test_a_converted_config_is_read_strictly(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = write_vmla(tmp_path / "f", converted(), MLA)
    write_json(folder / "config.json", {**converted_config(MLA), **change})
    refused(folder, message)

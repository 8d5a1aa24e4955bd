"""A LoRA in every file form merges into the same weights; a LoRA that does not fit is refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from vmla_convert.checkpoint.geometry import native_shapes
from vmla_convert.checkpoint.keymap import DIFFUSERS_RULES, invert, to_native
from vmla_convert.checkpoint.lora import Lora, open_lora, parse_lora
from vmla_convert.checkpoint.source import TensorSource, TensorSpec
from vmla_convert.config import Geometry
from vmla_convert.errors import CheckpointError, ConfigError

GEOMETRY = Geometry(
    dim=24,
    ffn_dim=20,
    num_heads=2,
    num_layers=2,
    in_dim=4,
    out_dim=4,
    freq_dim=16,
    text_dim=10,
    text_len=8,
)
SHAPES = native_shapes(GEOMETRY)
SPECS = {name: TensorSpec(shape, torch.bfloat16) for name, shape in SHAPES.items()}
RANK, ALPHA, SCALE = 4, 6, 0.5

# Square, wide and tall weights, names with underscores and digits, and the convolution.
MODULES = (
    "blocks.0.self_attn.q",
    "blocks.1.self_attn.o",
    "blocks.1.cross_attn.k",
    "blocks.0.ffn.0",
    "blocks.1.ffn.2",
    "text_embedding.2",
    "time_projection.1",
    "head.head",
    "patch_embedding",
)
TARGETS = {f"{module}.weight" for module in MODULES}
Q = "blocks.0.self_attn.q"
Q_DOWN, Q_UP = f"{Q}.lora_down.weight", f"{Q}.lora_up.weight"

Tensors = dict[str, torch.Tensor]
Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]


def native(dtype: torch.dtype = torch.float32) -> Tensors:
    torch.manual_seed(0)
    return {name: torch.randn(shape).to(dtype) for name, shape in SHAPES.items()}


def random_pairs(seed: int = 1, modules: tuple[str, ...] = MODULES) -> Pairs:
    torch.manual_seed(seed)
    pairs = {}
    for module in modules:
        rows, *columns = SHAPES[f"{module}.weight"]
        ones = [1] * (len(columns) - 1)
        pairs[module] = (torch.randn(RANK, *columns), torch.randn(rows, RANK, *ones))
    return pairs


def product(pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The product up · down, with the shape of the weight."""
    down, up = pair
    return torch.einsum("rc...,dr->dc...", down, up.flatten(1))


def named(pairs: Pairs, down: str, up: str, prefix: str = "") -> Tensors:
    halves = [{f"{prefix}{m}.{down}": a, f"{prefix}{m}.{up}": b} for m, (a, b) in pairs.items()]
    return {name: tensor for half in halves for name, tensor in half.items()}


def with_alphas(tensors: Tensors, pairs: Pairs, prefix: str = "") -> Tensors:
    return tensors | {f"{prefix}{module}.alpha": torch.tensor(float(ALPHA)) for module in pairs}


def write(file: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    file.parent.mkdir(exist_ok=True, parents=True)
    save_file({n: t.clone().contiguous() for n, t in tensors.items()}, file, metadata)
    return file


def write_native(folder: Path, pairs: Pairs) -> Path:
    tensors = named(pairs, "lora_A.weight", "lora_B.weight")
    return write(folder / "l.safetensors", tensors)


def write_comfy(folder: Path, pairs: Pairs) -> Path:
    prefix = "diffusion_model."
    tensors = named(pairs, "lora_down.weight", "lora_up.weight", prefix)
    return write(folder / "l.safetensors", with_alphas(tensors, pairs, prefix))


def write_flat_convolution(folder: Path, pairs: Pairs) -> Path:
    flat = {module: (down.flatten(1), up.flatten(1)) for module, (down, up) in pairs.items()}
    return write_native(folder, flat)


def write_adapter(folder: Path, pairs: Pairs, **config: Any) -> Path:
    tensors = named(pairs, "lora_A.weight", "lora_B.weight", "base_model.model.")
    write(folder / "adapter_model.safetensors", tensors)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "alpha_pattern": {}, **config}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def write_peft_names(folder: Path, pairs: Pairs) -> Path:
    prefix = "base_model.model.model."
    tensors = named(pairs, "lora_A.default.weight", "lora_B.default.weight", prefix)
    return write(folder / "l.safetensors", tensors)


def write_longlive(folder: Path, pairs: Pairs) -> Path:
    prefix = "base_model.model._fsdp_wrapped_module."
    tensors = named(pairs, "lora_A.default.weight", "lora_B.default.weight", prefix)
    wrapped = {n.replace("blocks.1.", "blocks.1._orig_mod."): t for n, t in tensors.items()}
    state = {"critic_lora": {"x": torch.ones(1)}, "generator_lora": wrapped, "step": 7}
    folder.mkdir()
    torch.save(state, folder / "lora.pt")
    return folder / "lora.pt"


def write_flat_pickle(folder: Path, pairs: Pairs) -> Path:
    folder.mkdir()
    tensors = named(pairs, "lora_A.weight", "lora_B.weight", "model.")
    torch.save(tensors, folder / "lora.pt")
    return folder / "lora.pt"


def diffusers_module(module: str) -> str:
    (foreign,) = to_native([f"{module}.weight"], invert(DIFFUSERS_RULES))
    return foreign.removesuffix(".weight")


def write_diffusers(folder: Path, pairs: Pairs) -> Path:
    foreign = {diffusers_module(module): pair for module, pair in pairs.items()}
    tensors = named(foreign, "lora_A.weight", "lora_B.weight", "transformer.")
    settings = {"transformer.r": RANK, "transformer.lora_alpha": ALPHA}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(settings)}
    return write(folder / "pytorch_lora_weights.safetensors", tensors, metadata)


def write_kohya(folder: Path, pairs: Pairs) -> Path:
    flat = {module.replace(".", "_"): pair for module, pair in pairs.items()}
    tensors = named(flat, "lora_down.weight", "lora_up.weight", "lora_unet_")
    return write(folder / "l.safetensors", with_alphas(tensors, flat, "lora_unet_"))


# The writer of each form, and the alpha that the form states; without one, alpha is the rank.
FORMS: dict[str, tuple[Callable[[Path, Pairs], Path], int]] = {
    "native": (write_native, RANK),
    "down and up": (write_comfy, ALPHA),
    "flattened convolution": (write_flat_convolution, RANK),
    "PEFT folder": (write_adapter, ALPHA),
    "PEFT file": (lambda f, p: write_adapter(f, p) / "adapter_model.safetensors", ALPHA),
    "PEFT with its adapter's name": (write_peft_names, RANK),
    "LongLive": (write_longlive, RANK),
    "flat pickle": (write_flat_pickle, RANK),
    "folder of a pickle": (lambda f, p: write_flat_pickle(f, p).parent, RANK),
    "diffusers": (write_diffusers, ALPHA),
    "diffusers folder": (lambda f, p: write_diffusers(f, p).parent, ALPHA),
    "kohya": (write_kohya, ALPHA),
}


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_merges_into_the_same_weights(form: str, tmp_path: Path) -> None:
    writer, alpha = FORMS[form]
    pairs, tensors = random_pairs(), native()
    lora = open_lora(writer(tmp_path / "f", pairs), SCALE, SPECS)
    assert lora.deltas.keys() == TARGETS
    for name, tensor in tensors.items():
        before = tensor.clone()
        merged = lora.apply(name, tensor)
        if name in TARGETS:
            change = SCALE * alpha / RANK * product(pairs[name.removesuffix(".weight")])
            close(merged, tensor + change)
            assert merged.shape == tensor.shape
        else:
            assert merged is tensor
        assert torch.equal(tensor, before)


@pytest.mark.parametrize("writer", [write_kohya, write_comfy])
def test_diffusers_own_converters_agree(
    writer: Callable[[Path, Pairs], Path], tmp_path: Path
) -> None:
    """A file merges like the file that diffusers makes from it."""
    from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin

    parts = [f"{kind}_attn.{part}" for kind in ("self", "cross") for part in "qkvo"]
    parts += ["ffn.0", "ffn.2"]
    pairs = random_pairs(modules=tuple(f"blocks.{i}.{part}" for i in (0, 1) for part in parts))
    path = writer(tmp_path / "l", pairs)
    theirs: Any = WanLoraLoaderMixin.lora_state_dict(str(path))
    converted = write(tmp_path / "theirs.safetensors", theirs)
    ours, other = (open_lora(file, SCALE, SPECS) for file in (path, converted))
    assert ours.deltas.keys() == other.deltas.keys() == {f"{module}.weight" for module in pairs}
    for name, tensor in native().items():
        close(ours.apply(name, tensor), other.apply(name, tensor))


DIFFS = {
    "blocks.0.self_attn.q.diff_b": "blocks.0.self_attn.q.bias",
    "blocks.0.self_attn.norm_q.diff": "blocks.0.self_attn.norm_q.weight",
    "blocks.1.norm3.diff": "blocks.1.norm3.weight",
    "blocks.1.norm3.diff_b": "blocks.1.norm3.bias",
    "blocks.1.diff_m": "blocks.1.modulation",
    "patch_embedding.diff": "patch_embedding.weight",
    "patch_embedding.diff_b": "patch_embedding.bias",
    "head.head.diff_b": "head.head.bias",
    "head.diff_m": "head.modulation",
}


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "lora_unet_"])
def test_differences_are_added_without_alpha(prefix: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    diffs = {name: torch.randn(SHAPES[target]) for name, target in DIFFS.items()}
    pairs = random_pairs(modules=(Q,))
    source = with_alphas(diffs | named(pairs, "lora_down.weight", "lora_up.weight"), pairs)
    if prefix == "lora_unet_":
        source = {kohya(name): tensor for name, tensor in source.items()}
    file = write(tmp_path / "l.safetensors", {prefix + name: t for name, t in source.items()})
    lora, tensors = open_lora(file, SCALE, SPECS), native()
    assert lora.deltas.keys() == {*DIFFS.values(), f"{Q}.weight"}
    for name, target in DIFFS.items():
        close(lora.apply(target, tensors[target]), tensors[target] + SCALE * diffs[name])


def kohya(name: str) -> str:
    module, part = re.findall(r"(.+?)\.(lora_\w+\.weight|alpha|diff\w*)$", name)[0]
    return f"{module.replace('.', '_')}.{part}"


def test_a_bias_of_the_up_matrix_is_scaled_as_the_matrix_is(tmp_path: Path) -> None:
    pairs, bias = random_pairs(modules=(Q,)), torch.randn(24)
    tensors = with_alphas(named(pairs, "lora_A.weight", "lora_B.weight"), pairs)
    tensors[f"{Q}.lora_B.bias"] = bias
    lora = open_lora(write(tmp_path / "l.safetensors", tensors), SCALE, SPECS)
    assert lora.deltas.keys() == {f"{Q}.weight", f"{Q}.bias"}
    close(lora.apply(f"{Q}.bias", torch.ones(24)), 1 + SCALE * ALPHA / RANK * bias)


def test_the_norms_of_both_layouts_do_not_mix(tmp_path: Path) -> None:
    change = torch.ones(24)
    theirs = {"blocks.0.norm2.diff": change, "blocks.0.attn1.to_k.diff_b": change}
    lora = open_lora(write(tmp_path / "l.safetensors", theirs), 1.0, SPECS)
    assert lora.deltas.keys() == {"blocks.0.norm3.weight", "blocks.0.self_attn.k.bias"}
    ours = {"blocks.0.norm2.diff": change, "blocks.0.self_attn.k.diff_b": change}
    refused(write(tmp_path / "m.safetensors", ours), "blocks.0.norm2.diff")


def opened(folder: Path, seed: int, scale: float) -> Lora:
    path = folder / f"{seed}.safetensors"
    if not path.exists():
        write(path, named(random_pairs(seed), "lora_A.weight", "lora_B.weight"))
    return open_lora(path, scale, SPECS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("loras")


scales = st.floats(-3, 3, width=32)


@settings(max_examples=20, deadline=None)
@given(first=scales, second=scales, name=st.sampled_from(sorted(TARGETS)))
def test_two_loras_merge_as_their_sum_in_any_order(
    folder: Path, first: float, second: float, name: str
) -> None:
    one, two = opened(folder, 1, first), opened(folder, 2, second)
    weight, module = native()[name], name.removesuffix(".weight")
    total = first * product(random_pairs(1)[module]) + second * product(random_pairs(2)[module])
    close(two.apply(name, one.apply(name, weight)), weight + total, 3e-5)
    close(one.apply(name, two.apply(name, weight)), weight + total, 3e-5)
    close(opened(folder, 1, -first).apply(name, one.apply(name, weight)), weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sum_is_rounded_once(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(5)
    # Whole numbers, so that the float32 sum has one value whatever the order.
    down, up = torch.randint(-99, 100, (2, RANK, 24)).float()
    tensors = named({Q: (down.to(dtype), up.T.to(dtype))}, "lora_A.weight", "lora_B.weight")
    lora = open_lora(write(tmp_path / "l.safetensors", tensors), 0.75, SPECS)
    weight = native(dtype)[f"{Q}.weight"]
    merged = lora.apply(f"{Q}.weight", weight)
    assert merged.dtype == dtype
    assert torch.equal(merged, (weight.float() + 0.75 * (up.T @ down)).to(dtype))
    twice = weight + (0.75 * (up.T @ down)).to(dtype)
    assert not torch.equal(merged, twice)
    wide = native(torch.float64)[f"{Q}.weight"]
    close(lora.apply(f"{Q}.weight", wide), wide + 0.75 * (up.T @ down).double(), 1e-14)


def test_matrices_are_read_when_they_are_applied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = open_lora(write_comfy(tmp_path / "f", random_pairs()), 1.0, SPECS)
    read: list[str] = []
    source_read = type(lora.source).read

    def spy(source: TensorSource, name: str) -> torch.Tensor:
        read.append(name)
        return source_read(source, name)

    monkeypatch.setattr(type(lora.source), "read", spy)
    open_lora(tmp_path / "f" / "l.safetensors", 1.0, SPECS)
    assert {name.rpartition(".")[2] for name in read} == {"alpha"}
    read.clear()
    lora.apply(f"{Q}.weight", native()[f"{Q}.weight"])
    assert read == [f"diffusion_model.{Q_DOWN}", f"diffusion_model.{Q_UP}"]


def test_the_factor_follows_the_settings_and_the_files_alpha(tmp_path: Path) -> None:
    pairs, weight = random_pairs(modules=(Q,)), torch.zeros(24, 24)
    rooted = write_adapter(tmp_path / "a", pairs, use_rslora=True)
    several_ranks = write_adapter(tmp_path / "b", pairs, r=16, rank_pattern={"q": RANK})
    own_alpha = write_comfy(tmp_path / "c", pairs)
    (tmp_path / "c" / "adapter_config.json").write_text('{"lora_alpha": 99}')
    for path, divisor in ((rooted, math.sqrt(RANK)), (several_ranks, RANK), (own_alpha, RANK)):
        merged = open_lora(path, 1.0, SPECS).apply(f"{Q}.weight", weight)
        close(merged, ALPHA / divisor * product(pairs[Q]))


@pytest.mark.parametrize("alpha", [torch.tensor([[3]]), torch.tensor(3, dtype=torch.bfloat16)])
def test_alphas_of_any_kind_of_number(alpha: torch.Tensor, tmp_path: Path) -> None:
    tensors = {Q_DOWN: torch.eye(24), Q_UP: torch.eye(24), f"{Q}.alpha": alpha}
    lora = open_lora(write(tmp_path / "l.safetensors", tensors), 1.0, SPECS)
    close(lora.apply(f"{Q}.weight", torch.zeros(24, 24)), torch.eye(24) / 8)


def refused(path: Path, *names: str, specs: dict[str, TensorSpec] | None = None) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        open_lora(path, 1.0, specs or SPECS)
    for name in names:
        assert name in caught.value.message
    assert caught.value.hint
    assert not caught.value.message.endswith(".")
    return caught.value


I2V = "blocks.0.cross_attn.k_img"
DOWN, UP = torch.ones(RANK, 24), torch.ones(24, RANK)
REFUSALS: dict[str, tuple[Tensors, list[str]]] = {
    "a whole model": (
        {"blocks.0.self_attn.q.weight": DOWN},
        ["holds no LoRA", "blocks.0.self_attn.q.weight"],
    ),
    "a stray tensor": (
        {Q_DOWN: DOWN, Q_UP: UP, "blocks.0.self_attn.q.base_layer.weight": UP},
        ["1 tensors", "q.base_layer.weight"],
    ),
    "no such block": ({"blocks.2.diff_m": torch.ones(1, 6, 24)}, ["blocks.2.diff_m"]),
    "no bias there": ({"blocks.0.self_attn.norm_q.diff_b": torch.ones(24)}, ["norm_q.diff_b"]),
    "a text encoder's": (
        {"lora_te_x.lora_down.weight": DOWN, "lora_te_x.lora_up.weight": UP},
        ["lora_te_x"],
    ),
    "image-to-video, native": ({f"{I2V}.diff_b": torch.ones(24)}, [I2V]),
    "image-to-video, diffusers": (
        {"transformer.blocks.0.attn2.add_k_proj.lora_A.weight": DOWN}
        | {"transformer.blocks.0.attn2.add_k_proj.lora_B.weight": UP}
        | {"transformer.blocks.0.attn2.to_k.lora_A.weight": DOWN}
        | {"transformer.blocks.0.attn2.to_k.lora_B.weight": UP},
        ["1 tensors", "add_k_proj"],
    ),
    "image-to-video patches": (
        {"patch_embedding.diff": torch.ones(24, 36, 1, 2, 2)},
        ["patch_embedding.diff", "(24, 4, 1, 2, 2)"],
    ),
    "two spellings": (
        {Q_DOWN: DOWN, Q_UP: UP}
        | {"lora_unet_head_head.lora_down.weight": DOWN, "lora_unet_head_head.lora_up.weight": UP},
        ["head_head"],
    ),
    "down without up": ({Q_DOWN: DOWN}, [Q_DOWN, "no up matrix"]),
    "up without down": ({Q_UP: UP}, [Q_UP, "no down matrix"]),
    "alpha alone": ({f"{Q}.alpha": torch.ones(())}, [f"{Q}.alpha", "no down and no up"]),
    "columns": ({Q_DOWN: torch.ones(RANK, 23), Q_UP: UP}, [f"{Q}.weight", "(24, 24)", "(4, 23)"]),
    "rows": ({Q_DOWN: DOWN, Q_UP: torch.ones(23, RANK)}, [f"{Q}.weight", "(24, 24)"]),
    "ranks": ({Q_DOWN: DOWN, Q_UP: torch.ones(24, 3)}, [f"{Q}.weight", "(24, 3)"]),
    "no rank": ({Q_DOWN: torch.ones(0, 24), Q_UP: torch.ones(24, 0)}, [f"{Q}.weight"]),
    "an up kernel": ({Q_DOWN: DOWN, Q_UP: torch.ones(24, RANK, 2)}, [f"{Q}.weight"]),
    "a turned kernel": (
        {"patch_embedding.lora_A.weight": torch.ones(RANK, 4, 2, 1, 2)}
        | {"patch_embedding.lora_B.weight": UP},
        ["patch_embedding.weight", "(24, 4, 1, 2, 2)"],
    ),
    "a pair on a vector": (
        {"blocks.0.norm3.lora_A.weight": torch.ones(1, 1)}
        | {"blocks.0.norm3.lora_B.weight": torch.ones(24, 1)},
        ["blocks.0.norm3.weight", "(24,)"],
    ),
    "a difference": ({f"{Q}.diff_b": torch.ones(1, 24)}, [f"{Q}.diff_b", "(24,)", f"{Q}.bias"]),
    "a bias": (
        {Q_DOWN: DOWN, Q_UP: UP, f"{Q}.lora_up.bias": torch.ones(4)},
        [f"{Q}.lora_up.bias", "(24,)"],
    ),
    "two alphas": (
        {Q_DOWN: DOWN, Q_UP: UP, f"{Q}.alpha": torch.ones(2)},
        [f"{Q}.alpha"],
    ),
    "alpha NaN": ({Q_DOWN: DOWN, Q_UP: UP, f"{Q}.alpha": torch.tensor(math.nan)}, [f"{Q}.alpha"]),
    "float8": ({Q_DOWN: DOWN.to(torch.float8_e4m3fn), Q_UP: UP}, ["quantised", Q_DOWN]),
    "int8": ({Q_DOWN: DOWN, Q_UP: UP.to(torch.int8)}, ["quantised", Q_UP]),
    "DoRA, kohya": (
        {Q_DOWN: DOWN, Q_UP: UP, f"{Q}.dora_scale": torch.ones(24, 1)},
        ["DoRA", "dora_scale"],
    ),
    "DoRA, PEFT": (
        {Q_DOWN: DOWN, Q_UP: UP, f"{Q}.lora_magnitude_vector.default.weight": torch.ones(24)},
        ["DoRA", "lora_magnitude_vector"],
    ),
    "LoKr": ({f"{Q}.lokr_w1": torch.ones(2, 2)}, ["LoKr", f"{Q}.lokr_w1"]),
    "LoHa": ({f"{Q}.hada_w1_a": torch.ones(24, 4)}, ["LoHa", f"{Q}.hada_w1_a"]),
    "two adapters": (
        {f"{Q}.lora_A.one.weight": DOWN, f"{Q}.lora_A.two.weight": DOWN},
        ["lora_A.one", "lora_A.two"],
    ),
    "prefixes for one tensor": (
        {f"diffusion_model.{Q_DOWN}": DOWN, Q_DOWN: DOWN, Q_UP: UP},
        [f"'diffusion_model.{Q_DOWN}'", f"'{Q_DOWN}'"],
    ),
    "changed twice": (
        {Q_DOWN: DOWN, Q_UP: UP, f"{Q}.diff": torch.ones(24, 24)},
        [f"{Q}.weight twice", Q_DOWN, f"{Q}.diff"],
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_does_not_fit_is_named(case: str, tmp_path: Path) -> None:
    tensors, names = REFUSALS[case]
    path = write(tmp_path / "l.safetensors", tensors)
    error = refused(path, *names)
    assert str(path) in error.message
    if case.startswith("image-to-video, "):
        assert "text-to-video" in error.hint


def test_kohya_names_that_may_be_two_tensors_are_refused(tmp_path: Path) -> None:
    specs = {name: SPECS[f"{Q}.weight"] for name in ("a.b_c.weight", "a.b.c.weight", "a.d.weight")}
    pair = (DOWN, UP)
    path = write_kohya(tmp_path / "one", {"a.b_c": pair})
    refused(path, str(path), "lora_unet_a_b_c", "a.b_c.weight", "a.b.c.weight", specs=specs)
    path = write_kohya(tmp_path / "other", {"a.d": pair})
    assert open_lora(path, 1.0, specs).deltas.keys() == {"a.d.weight"}


def test_kohya_names_of_a_whole_model_are_unambiguous(tmp_path: Path) -> None:
    diffs = {}
    for name, shape in SHAPES.items():
        module, _, kind = name.rpartition(".")
        part = {"weight": "diff", "bias": "diff_b", "modulation": "diff_m"}[kind]
        diffs[f"lora_unet_{module.replace('.', '_')}.{part}"] = torch.ones(shape)
    path = write(tmp_path / "l.safetensors", diffs)
    assert open_lora(path, 1.0, SPECS).deltas.keys() == set(SHAPES)


@pytest.mark.parametrize(
    ("name", "value"), [(Q_UP, math.nan), (Q_DOWN, math.inf), (f"{Q}.diff_b", -math.inf)]
)
def test_numbers_that_are_not_finite_are_named(name: str, value: float, tmp_path: Path) -> None:
    tensors = {Q_DOWN: DOWN.clone(), Q_UP: UP.clone(), f"{Q}.diff_b": torch.ones(24)}
    tensors[name].view(-1)[-1] = value
    lora = open_lora(write(tmp_path / "l.safetensors", tensors), 1.0, SPECS)
    target = f"{Q}.bias" if name.endswith("diff_b") else f"{Q}.weight"
    with pytest.raises(CheckpointError, match=re.escape(name)) as caught:
        lora.apply(target, native()[target])
    assert caught.value.hint


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 8}, "rank 4"),
        ({"r": "4"}, "'4'"),
        ({"lora_alpha": "6"}, "'6'"),
        ({"lora_alpha": True}, "True"),
        ({"lora_alpha": 0}, "lora_alpha 0"),
        ({"lora_alpha": math.nan}, "NaN"),
        ({"alpha_pattern": {"q": 3}}, "alpha_pattern"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    refused(write_adapter(tmp_path / "f", random_pairs(), **config), message)


@pytest.mark.parametrize("text", ["{", "[1]", "\udcff"])
def test_settings_that_are_no_table_are_refused(text: str, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "f", random_pairs())
    (path / "adapter_config.json").write_text(text, "utf-8", "surrogateescape")
    refused(path, "JSON")


def test_a_file_that_cannot_be_opened_says_why(tmp_path: Path) -> None:
    refused(tmp_path / "none.safetensors", "no checkpoint")
    (tmp_path / "l.pt").write_bytes(b"x")
    refused(tmp_path / "l.pt", "not a whole torch checkpoint")
    torch.save({"generator_lora": {"a": 3}}, tmp_path / "m.pt")
    refused(tmp_path / "m.pt", "not tensors")


@pytest.mark.parametrize(
    ("option", "path", "scale"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.pt:-1", "a.pt", -1.0),
        ("a.pt:.5", "a.pt", 0.5),
        ("a.pt:1E-3", "a.pt", 1e-3),
        ("C:\\loras\\a.pt:0.5", "C:\\loras\\a.pt", 0.5),
        ("12:30:0.5", "12:30", 0.5),
        *((name, name, 1.0) for name in ("C:\\a.pt", "a:b", "a.pt:", "a.pt:0,8", "a.pt:1_0")),
        *((name, name, 1.0) for name in ("a.pt: 1", "a.pt:٣", "0.5")),
    ],
)
def test_only_a_last_number_is_a_scale(option: str, path: str, scale: float) -> None:
    assert parse_lora(option) == (Path(path), scale)


@given(st.floats(allow_nan=False, allow_infinity=False), st.text(min_size=1))
def test_scales_read_back_as_they_were_written(scale: float, file: str) -> None:
    assert parse_lora(f"{file}:{scale!r}") == (Path(file), scale)


@pytest.mark.parametrize("option", ["a:nan", "a:inf", "a:-Infinity", "a:1e999", "", ":0.5"])
def test_options_without_a_finite_scale_or_a_file_are_refused(option: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"'{option}'")) as caught:
        parse_lora(option)
    assert "0.8" in caught.value.hint

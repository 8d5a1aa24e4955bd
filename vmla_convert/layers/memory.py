"""Peak memory of passes of a model, by formula.

The formulas count the tensors that exist together at the fullest moment of a pass: weights, cache,
activations, and what autograd keeps. They leave out the few hundred MB of Python, of a CUDA context
and of an allocator's fragments. Tests hold the formulas to the tensors of true models.

Numbers of tokens count all clips of a batch. Letters: T query tokens, S window tokens, d width.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch

from vmla_convert.config import DENSE_BITS, DENSE_ITEMSIZE, ModelConfig, RuntimeConfig
from vmla_convert.layers.attention import TILE_MIB
from vmla_convert.layers.dit import CausalWanModel

FLOAT32 = 4
"""Bytes of a float32 number."""

GPU_HEADROOM = 10**9
"""Bytes of a GPU that no formula counts: the CUDA context, and what an allocator cannot use."""


class Memory(NamedTuple):
    """Peak bytes of a stage.

    Attributes:
        device: Bytes on the GPU; of a CPU, bytes of what would lie on a GPU.
        host: Bytes in host memory beside a GPU.
        staging: Bytes in host memory on the way to or from a GPU; a CPU needs none.
        together: Bytes of `device` and `host` at one moment; None where both peak together.
    """

    device: int
    host: int = 0
    staging: int = 0
    together: int | None = None

    @property
    def without_gpu(self) -> int:
        """Bytes of host memory where the host computes."""
        return self.device + self.host if self.together is None else self.together

    def peak(self, other: Memory) -> Memory:
        """Peak of two phases that follow each other."""
        return Memory(
            max(self.device, other.device),
            max(self.host, other.host),
            max(self.staging, other.staging),
            max(self.without_gpu, other.without_gpu),
        )


class ClipShape(NamedTuple):
    """Latent frames of a clip, and height and width of a latent frame."""

    frames: int
    height: int
    width: int


@cache
def parameter_count(config: ModelConfig) -> int:
    """Numbers in the weights of a model, codec included."""
    with torch.device("meta"):
        return sum(tensor.numel() for tensor in CausalWanModel(config).state_dict().values())


def streams_on(config: ModelConfig, runtime: RuntimeConfig, nbytes: int) -> int:
    """Clips with a full window that a GPU of some bytes generates together, in 16-bit numbers."""
    room = nbytes - GPU_HEADROOM
    return most(lambda clips: streaming_memory(config, runtime, 2, clips).device <= room)


def most(fits: Callable[[int], bool]) -> int:
    """Largest number that fits, where all smaller ones do; 0 where 1 does not."""
    if not fits(1):
        return 0
    above = 2
    while fits(above):
        above *= 2
    return bisect_left(range(above // 2, above), True, key=lambda n: not fits(n)) + above // 2 - 1


def streaming_memory(
    config: ModelConfig,
    runtime: RuntimeConfig,
    itemsize: int,
    clips: int = 1,
    on_gpu: bool = True,
) -> Memory:
    """Peak of generating with a full window: weights, cache, prompt and one layer's activations.

    Args:
        config: The model, dense or converted.
        runtime: Size, place and tiles of the cache.
        itemsize: Bytes of a number of the model's dtype.
        clips: Clips that are generated together.
        on_gpu: Whether the model runs on a GPU, whose tiles are larger by default.
    """
    geometry, frames = config.geometry, config.cache.window_frames
    held = config.cache_bytes(frames, clips, runtime)
    if config.codec is None and runtime.cache_dtype not in DENSE_BITS:
        held = held * itemsize // DENSE_ITEMSIZE
    prompt = 2 * geometry.num_layers * geometry.dim + geometry.text_dim
    resident = itemsize * (parameter_count(config) + clips * geometry.text_len * prompt)
    resident += streaming_activations(config, runtime, itemsize, clips, on_gpu)
    if not runtime.offload:
        return Memory(resident + held)
    return Memory(resident + held // geometry.num_layers, held)


def streaming_activations(
    config: ModelConfig, runtime: RuntimeConfig, itemsize: int, clips: int, on_gpu: bool
) -> int:
    """Bytes of the fullest moment of one block: rotating keys, attending, or the feed-forward."""
    geometry, per_frame = config.geometry, clips * config.tokens_per_frame
    chunk, window = (n * per_frame for n in (config.chunk_frames, config.cache.window_frames))
    stream, narrow = itemsize * chunk * geometry.dim, itemsize < FLOAT32
    tables = FLOAT32 * geometry.head_dim * (chunk + window)
    # Rotation computes in float32: a float32 copy, the product, and the narrow result.
    rotating = 2 * FLOAT32 + itemsize if narrow else FLOAT32
    if config.is_dense and runtime.cache_dtype not in DENSE_BITS:
        # Input, norm, query, key and value of the chunk; then all keys rotate.
        attending = 5 * stream + rotating * window * geometry.dim
    else:
        # Input, norm, query, rotated query, key and value; MLA also a tile's and the whole output.
        tile = _tile_bytes(config, runtime, itemsize, window, chunk, on_gpu)
        attending = 6 * stream + tile
        # Keys and values of past and chunk, which MLA has in tiles only.
        attending += 3 * stream if config.mla else 2 * itemsize * window * geometry.dim
    # Four tensors of the residual stream, and two hidden ones.
    feed_forward = 4 * stream + 2 * itemsize * chunk * geometry.ffn_dim
    return max(attending, feed_forward) + tables


def _tile_bytes(
    config: ModelConfig,
    runtime: RuntimeConfig,
    itemsize: int,
    window: int,
    chunk: int,
    on_gpu: bool,
) -> int:
    """Bytes of the keys and values of a tile of heads, rebuilt, and of the numbers they come from.

    Numbers of tokens count all clips.
    """
    geometry, narrow = config.geometry, itemsize < FLOAT32
    width, tokens = geometry.head_dim, window - chunk
    if config.is_dense:
        # A quantised dense past is rebuilt whole: codes of keys and values, and float32 copies.
        return 4 * FLOAT32 * tokens * geometry.dim
    if config.mla is not None:
        # MLA rebuilds the chunk too. Keys have rope channels, and values are padded to their width.
        key = width + max(map(config.mla.qk_rope_head_dim, range(geometry.num_layers)))
        tokens, per_head, tiled = window, itemsize * (2 * key + width), key + width
        source = max(config.mla.kv_lora_rank)
    else:
        # 16-bit keys rotate as a float32 copy, a product and a narrow result; others in place.
        per_head = width * (2 * FLOAT32 + itemsize if narrow else 0)
        tiled, source = 2 * width, config.codec.rank if config.codec else 0
    most = (runtime.tile_mib or TILE_MIB["cuda" if on_gpu else "cpu"]) * 2**20
    heads = most // max(1, tokens * tiled * (itemsize + FLOAT32 if narrow else itemsize))
    # Tiles are of nearly equal size.
    heads = -(-geometry.num_heads // -(-geometry.num_heads // max(1, heads)))
    return tokens * (per_head * heads + itemsize * source)


def training_pass_bytes(
    config: ModelConfig,
    clip: ClipShape,
    clips: int,
    narrow: bool,
    checkpointed: bool,
    train: str = "new",
    offloaded: bool = False,
    casts: bool = True,
) -> int:
    """Peak bytes of activations of a teacher-forced pass and its backward pass.

    A clip has 2F frames: clean, then noisy. The residual stream is float32.

    Args:
        config: The model that trains.
        clip: Shape of a clip.
        clips: Clips that pass together.
        narrow: Whether matrices multiply in 16 bits (mixed precision).
        checkpointed: Whether blocks keep only their inputs.
        train: `RecoverConfig.train`.
        offloaded: Whether the inputs of blocks wait in host memory.
        casts: Whether frozen weights are float32, so that autocast keeps narrow copies of them.
    """
    geometry = config.geometry
    tokens = 2 * clips * clip.frames * geometry.tokens_per_frame((clip.height, clip.width))
    item, stream = 2 if narrow else FLOAT32, FLOAT32 * tokens * geometry.dim
    block = block_bytes(config, clip.frames, tokens, item, casts)
    block += _inputs_of_trained(config, tokens, item, train)
    # The backward pass of the feed-forward has two more hidden tensors and one gradient.
    backward = item * tokens * (2 * geometry.ffn_dim + geometry.dim)
    layers = geometry.num_layers
    kept = layers * block
    if checkpointed:
        # One offloaded input is on the way to the host while the next block runs.
        kept = (2 if offloaded else layers) * stream + block - stream
    return kept + backward


def block_bytes(
    config: ModelConfig, frames: int, tokens: int, item: int, casts: bool = True
) -> int:
    """Bytes that autograd keeps of one block of frozen weights, over clips of 2F frames.

    Args:
        config: The model; without a codec the past is attended to as it is.
        frames: F.
        tokens: Tokens of all clips, clean and noisy.
        item: Bytes of a number in matrix products: 4, or 2 under autocast.
        casts: Whether autocast converts the weights, which are float32 then.
    """
    geometry, size = config.geometry, config.chunk_frames
    window = config.cache.window_frames
    # Keys that the groups of queries attend to, per token: each chunk is clean once, noisy once.
    seen = [min(end, window) / (2 * frames) for end in range(size, frames + 1, size)]
    first, past = seen[0], max(0, frames - size) / (2 * frames)
    if config.codec is not None:
        # Past and own keys of a group are copied together; the first chunk is a view of all keys.
        joined = 2 * (sum(seen) - first) + 1 + past
        encoded = 2 * past * item
    else:
        joined, encoded = sum(seen) - first + 1, 0.0
    # MLA keys have rope channels, and queries, values and outputs are padded to their width. The
    # layer's two trained projections keep their inputs.
    wide = 1.0
    if config.mla is not None:
        wide += (
            max(map(config.mla.qk_rope_head_dim, range(geometry.num_layers))) / geometry.head_dim
        )
        encoded = 2.0 * item
    # Float32 under autocast too: inputs of three layer norms and of three RMS norms.
    norms = 6 * FLOAT32
    # Query and output of both attentions; keys and values of the self-attention.
    attended = item * (2 + wide * (2 + 2 * joined))
    activations = tokens * geometry.dim * (norms + attended + encoded)
    hidden = item * tokens * geometry.ffn_dim
    # Autocast keeps a narrow copy of each frozen matrix for the backward pass.
    matrices = 8 * geometry.dim**2 + 2 * geometry.dim * geometry.ffn_dim
    copies = 2 * matrices if item == 2 and casts else 0
    return round(activations) + hidden + copies


def _inputs_of_trained(config: ModelConfig, tokens: int, item: int, train: str) -> int:
    """Bytes of inputs that a block keeps for the gradients of its own dense weights."""
    dim, hidden = config.geometry.dim, config.geometry.ffn_dim
    if train == "new":
        return 0
    # The input of the query's projection, and its normed query for the gain.
    attention = item + FLOAT32
    if train == "attention":
        return tokens * dim * attention
    # Also a normed key and a normed query, and inputs of the other projections and of both
    # modulations.
    rest = 2 * FLOAT32 + 2 * item + FLOAT32
    return tokens * dim * (attention + rest) + item * tokens * hidden

"""The convert stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from vmla_convert.config.checks import require_at_least
from vmla_convert.config.model import RankPlan
from vmla_convert.config.source import DataConfig

Product = Literal["codec", "mla"]
"""What a conversion makes: a codec beside the dense model, or a model with MLA layers."""


@dataclass(frozen=True)
class ConvertConfig:
    """The convert stage.

    A codec stores `channels` per layer and serves every size up to these; `cut` and
    `bytes_per_token` set the size that it has where none is asked for. An MLA layer has the size
    that it is made for: one budget (`cache_scalars` or `cut`), which the init `calibrated` divides
    among layers by the errors that it predicts; explicit ranks for every layer; or the plan of an
    earlier conversion. By default a token costs an eighth of the width plus a
    quarter of a head, the paper's 192 + 32 numbers for Wan 1.3B.

    Attributes:
        product: `codec` beside the dense model, or a model with `mla` layers.
        channels: Channels per layer that a codec stores; None for a sixth of the width, at least
            256 and at most the width.
        bytes_per_token: Default size of a codec's cache, per token and layer.
        cut: Share of the dense cache to save.
        init: MLA: one of `vmla_convert.maths.factor.INITS`.
        latent: MLA: as of `MLAConfig`.
        cache_scalars: MLA: numbers a token may cost per layer, averaged over layers, the key's norm
            among them.
        kv_lora_rank: MLA: R of every layer.
        qk_rope_head_dim: MLA: width of the shared rope key of every layer, even.
        plan: MLA: sizes layer by layer.
        dtype: Dtype of the weights that are written. None writes a codec as bfloat16; of an MLA
            model it leaves kept weights as they are and makes new ones float32.
        calibrate: Measure activations; False assumes white inputs.
        calibration_clips: Clips that activations are measured on.
        data: Where clips come from.
        seed: Seed of random projections and of the calibration noise.
    """

    product: Product = "codec"
    channels: int | None = None
    bytes_per_token: float | None = None
    cut: float | None = None
    init: str = "calibrated"
    latent: Literal["joint", "split"] = "joint"
    cache_scalars: int | None = None
    kv_lora_rank: int | None = None
    qk_rope_head_dim: int | None = None
    plan: RankPlan | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    calibrate: bool = True
    calibration_clips: int = 48
    data: DataConfig = field(default_factory=DataConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        require_at_least(self, 1, "calibration_clips")

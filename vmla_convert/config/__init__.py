"""Every setting as a frozen dataclass; no torch, so that `vmla --help` stays quick.

Letters for shapes, here and everywhere: B batch, T query tokens, S cached tokens, L tokens of any
kind, H heads, D head dim (H·D = `dim`), R latent rank, F frames, C channels.
"""

from vmla_convert.config.cache import DENSE_BITS, CachePolicy, RuntimeConfig
from vmla_convert.config.fitting import ConvertConfig, Product
from vmla_convert.config.geometry import DENSE_ITEMSIZE, Geometry
from vmla_convert.config.measuring import EvaluateConfig, GenerateConfig, ReportConfig, SweepConfig
from vmla_convert.config.model import (
    CONFIG_VERSION,
    CodecConfig,
    MediaConfig,
    MLAConfig,
    ModelConfig,
    SamplerConfig,
)
from vmla_convert.config.sizes import RankPlan, Sizes, default_rope_dim
from vmla_convert.config.source import DataConfig, SourceConfig
from vmla_convert.config.training import (
    NESTED_CUTS,
    DMDConfig,
    RecoverConfig,
    TeacherConfig,
    TrainingConfig,
)

__all__ = [
    "CONFIG_VERSION",
    "DENSE_BITS",
    "DENSE_ITEMSIZE",
    "NESTED_CUTS",
    "CachePolicy",
    "CodecConfig",
    "ConvertConfig",
    "DMDConfig",
    "DataConfig",
    "EvaluateConfig",
    "GenerateConfig",
    "Geometry",
    "MLAConfig",
    "MediaConfig",
    "ModelConfig",
    "Product",
    "RankPlan",
    "RecoverConfig",
    "ReportConfig",
    "RuntimeConfig",
    "SamplerConfig",
    "Sizes",
    "SourceConfig",
    "SweepConfig",
    "TeacherConfig",
    "TrainingConfig",
    "default_rope_dim",
]

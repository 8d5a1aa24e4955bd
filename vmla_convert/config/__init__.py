"""Every setting as a frozen dataclass; no torch, so that `vmla --help` stays quick."""

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
from vmla_convert.config.recipe import (
    STAGES,
    Recipe,
    RecipeInfo,
    command_recipe,
    parse_recipe,
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
    "STAGES",
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
    "Recipe",
    "RecipeInfo",
    "RecoverConfig",
    "ReportConfig",
    "RuntimeConfig",
    "SamplerConfig",
    "Sizes",
    "SourceConfig",
    "SweepConfig",
    "TeacherConfig",
    "TrainingConfig",
    "command_recipe",
    "default_rope_dim",
    "parse_recipe",
]

"""Our causal model as one of diffusers' models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from vmla_convert.checkpoint.layouts import DIFFUSERS
from vmla_convert.checkpoint.writer import write_checkpoint
from vmla_convert.config import ModelConfig, SourceConfig
from vmla_convert.errors import ConfigError, MissingExtraError
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.loading.load import (
    CONVERSION_NAME,
    Source,
    is_remote,
    load,
    locate,
    read_provenance,
)
from vmla_convert.loading.metadata_files import transformer_config
from vmla_convert.tables import from_dict, to_dict

try:
    # By these names in this very module, diffusers finds out how to load a class of ours.
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.loaders.peft import PeftAdapterMixin
    from diffusers.models.modeling_outputs import Transformer2DModelOutput
    from diffusers.models.modeling_utils import ModelMixin
    from diffusers.utils.accelerate_utils import apply_forward_hook
except ImportError as error:
    raise MissingExtraError("diffusers' pipelines", "wan") from error

# How diffusers reads files, which is not how these are read.
_NO_MATTER = frozenset(
    {"disable_mmap", "low_cpu_mem_usage", "max_memory", "offload_folder", "offload_state_dict"}
) | {"use_safetensors"}


class VMLATransformer(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """A dense or converted causal model, with diffusers' verbs for loading, saving and adapters.

    Attributes:
        wan: The model itself.
        record: What made a conversion, saved beside it again; empty where that is not known.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(self, model: dict[str, Any]) -> None:
        """Random weights.

        Args:
            model: A `ModelConfig` as `to_dict` gives it, and as config.json keeps it.
        """
        super().__init__()
        self.wan = CausalWanModel(from_dict(ModelConfig, model, "model"))
        self.record: dict[str, Any] = {}

    @classmethod
    def wrap(cls, model: CausalWanModel) -> Self:
        """The same model, its weights shared."""
        with torch.device("meta"):
            wrapped = cls(to_dict(model.config))
        wrapped.wan = model
        return wrapped.eval() if not model.training else wrapped

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        pretrained_model_name_or_path: Source,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        revision: str | None = None,
        device_map: str | torch.device | dict[str, Any] | None = None,
        **others: Any,
    ) -> Self:
        """Load any checkpoint that `vmla_convert.load` takes, frozen and in evaluation mode.

        Args:
            pretrained_model_name_or_path: A file or folder, `demo`, or a Hub id.
            subfolder: A folder in it.
            torch_dtype: Of all weights, or its name; float32 by default.
            dtype: The same, by its newer name.
            revision: Of a Hub id; of no matter where the checkpoint lies here.
            device_map: One device for all of it.
            others: What diffusers' own loader takes; refused unless it is of no matter here.

        Raises:
            CheckpointError: It is no checkpoint of a known layout.
            ConfigError: An option that is not for these models.
        """
        refuse_options(cls, others)
        source = of_revision(pretrained_model_name_or_path, revision)
        source = fetched(replace(source, file=subfolder or source.file))
        wanted = named_dtype(dtype or torch_dtype)
        wrapped = cls.wrap(load(source, _one_device(device_map), wanted))
        wrapped.record = read_provenance(source)
        return wrapped

    def save_pretrained(self, save_directory: str | Path) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Write config.json, the record and safetensors, under diffusers' names where it has them.

        Args:
            save_directory: A folder that is not there yet, or is empty; it appears whole.

        Raises:
            CheckpointError: The model has adapters, whose weights have no names there.
            OutputError: It is taken or cannot be written.
        """
        record = {CONVERSION_NAME: self.record} if self.record else {}
        write_checkpoint(
            Path(save_directory),
            self.wan.state_dict(),
            {"config.json": transformer_config(self.wan.config), **record},
            layout=replace(DIFFUSERS, folder=""),
        )

    @apply_forward_hook
    def ready(self) -> CausalWanModel:
        """The model to stream with, brought first to its device by a pipeline that offloads."""
        return self.wan

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Velocity of a clip as one chunk that sees all of itself; arguments as Wan's in diffusers.

        Streaming through a cache is what `VMLAPipeline` does.

        Args:
            hidden_states: Latents (B, C, F, height, width).
            timestep: (B,) or (), 0 to 1000.
            encoder_hidden_states: Prompt (B, text_len, text_dim).
            return_dict: False for a tuple.

        Returns:
            As `hidden_states`.
        """
        batch, _, frames, _, _ = hidden_states.shape
        times = timestep.expand(batch)[:, None].expand(batch, frames)
        places = torch.arange(frames, device=hidden_states.device)
        latents = hidden_states.transpose(1, 2)
        velocity = self.wan(latents, times, encoder_hidden_states, places).transpose(1, 2)
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)


def refuse_options(loader: type, options: Mapping[str, Any]) -> None:
    """Refuse what diffusers' own `from_pretrained` takes and would do nothing here.

    Raises:
        ConfigError: Naming the first such option that is set.
    """
    if odd := [name for name, value in options.items() if value and name not in _NO_MATTER]:
        raise ConfigError(
            f"{loader.__name__}.from_pretrained does not take '{odd[0]}'",
            "leave it out; HF_HOME, HF_TOKEN, HF_HUB_OFFLINE say where the Hub's cache is, who you "
            "are, and whether the cache must do",
        )


def of_revision(source: Source, revision: str | None) -> SourceConfig:
    """A checkpoint, of a revision if one is named."""
    source = source if isinstance(source, SourceConfig) else SourceConfig(str(source))
    if revision is None or not is_remote(source.checkpoint):
        return source
    return replace(source, checkpoint=f"{source.checkpoint}@{revision}")


def fetched(source: SourceConfig) -> SourceConfig:
    """The same checkpoint where it lies here, so that the Hub is asked once.

    Raises:
        CheckpointError: It cannot be had.
    """
    path, how = locate(source)
    return replace(how, checkpoint=str(path), file=None)


def named_dtype(given: torch.dtype | str | None) -> torch.dtype:
    """A dtype, or the one of that name; float32 where none is given.

    Raises:
        ConfigError: There is none, or one for each component.
    """
    dtype = getattr(torch, given, None) if isinstance(given, str) else given or torch.float32
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"torch_dtype {given!r} is no dtype", "try torch_dtype=torch.bfloat16")
    return dtype


def _one_device(device_map: str | torch.device | dict[str, Any] | None) -> torch.device | str:
    """A map's only device.

    Raises:
        ConfigError: The model was to be divided.
    """
    if isinstance(device_map, dict):
        return _one_device(device_map[""] if device_map.keys() == {""} else "auto")
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        raise ConfigError(
            "a VMLATransformer is not divided over devices",
            "name one device, or call enable_model_cpu_offload() on the pipeline",
        )
    return device_map if device_map is not None else "cpu"

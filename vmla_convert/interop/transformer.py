"""Our causal model as a diffusers model.

B clips, C latent channels, F latent frames.
"""

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
    # diffusers loads a class from another package only if these names are in its module.
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.loaders.peft import PeftAdapterMixin
    from diffusers.models.modeling_outputs import Transformer2DModelOutput
    from diffusers.models.modeling_utils import ModelMixin
    from diffusers.utils.accelerate_utils import apply_forward_hook
except ImportError as error:
    raise MissingExtraError("diffusers' pipelines", "wan") from error

# Options of diffusers' loaders that only change how files are read.
_HARMLESS = frozenset(
    {"disable_mmap", "low_cpu_mem_usage", "max_memory", "offload_folder", "offload_state_dict"}
) | {"use_safetensors"}


class VMLATransformer(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """A dense or converted causal model with diffusers' methods to load, save and adapt it.

    Attributes:
        wan: The model.
        record: The record of the conversion, saved beside the model; empty if it is not known.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(self, model: dict[str, Any]) -> None:
        """Make a model with random weights from a `ModelConfig` as a table, as in config.json."""
        super().__init__()
        self.wan = CausalWanModel(from_dict(ModelConfig, model, "model"))
        self.record: dict[str, Any] = {}

    @classmethod
    def wrap(cls, model: CausalWanModel) -> Self:
        """Wrap a model; the weights are shared."""
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
        base_model: str | Path | None = None,
        device_map: str | torch.device | dict[str, Any] | None = None,
        **others: Any,
    ) -> Self:
        """Load any checkpoint that `vmla_convert.load` takes, frozen and in evaluation mode.

        Args:
            pretrained_model_name_or_path: A file or folder, `demo`, or a Hub id.
            subfolder: A folder in the checkpoint's folder or repository.
            torch_dtype: Precision of all weights. Default: float32.
            dtype: Newer name of `torch_dtype`.
            revision: Revision of a Hub id; ignored for local checkpoints.
            base_model: Base model of a codec; by default the one that the codec names.
            device_map: One device for the whole model.
            others: Other options of diffusers' loader, refused if they would change the result.

        Raises:
            CheckpointError: The checkpoint is missing or has no known layout.
            ConfigError: An option does not apply to these models.
        """
        refuse_options(cls, others)
        source = settled(pretrained_model_name_or_path, revision, base_model)
        source = fetched(replace(source, file=subfolder or source.file))
        wrapped = cls.wrap(load(source, _one_device(device_map), named_dtype(dtype or torch_dtype)))
        wrapped.record = read_provenance(source)
        return wrapped

    def save_pretrained(self, save_directory: str | Path) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Write config.json, the conversion's record and safetensors to a new or empty folder.

        Raises:
            CheckpointError: The model has adapters, which this layout cannot store.
            OutputError: The folder holds files, or cannot be written.
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
        """Return the model; a pipeline with offloading first moves it to its device."""
        return self.wan

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Return the velocity of a clip as one chunk; arguments as in diffusers' Wan transformer.

        `VMLAPipeline` streams through a cache instead.

        Args:
            hidden_states: Latents (B, C, F, height, width).
            timestep: (B,) or (), from 0 to 1000.
            encoder_hidden_states: Contexts (B, text_len, text_dim).
            return_dict: False returns a tuple.
        """
        batch, _, frames, _, _ = hidden_states.shape
        times = timestep.expand(batch)[:, None].expand(batch, frames)
        frame_positions = torch.arange(frames, device=hidden_states.device)
        latents = hidden_states.transpose(1, 2)
        velocity = self.wan(latents, times, encoder_hidden_states, frame_positions).transpose(1, 2)
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)


def refuse_options(loader: type, options: Mapping[str, Any]) -> None:
    """Refuse options of diffusers' `from_pretrained` that have no effect here."""
    if odd := [name for name, value in options.items() if value and name not in _HARMLESS]:
        raise ConfigError(
            f"{loader.__name__}.from_pretrained does not take '{odd[0]}'",
            "leave it out; HF_HOME, HF_TOKEN and HF_HUB_OFFLINE set the Hub's cache, your token, "
            "and whether to stay offline",
        )


def settled(source: Source, revision: str | None, base_model: str | Path | None) -> SourceConfig:
    """Return a source with a base model and, if the source is on the Hub, a revision."""
    source = source if isinstance(source, SourceConfig) else SourceConfig(str(source))
    if base_model is not None:
        source = replace(source, base_model=str(base_model))
    if revision is None or not is_remote(source.checkpoint):
        return source
    return replace(source, checkpoint=f"{source.checkpoint}@{revision}")


def fetched(source: SourceConfig) -> SourceConfig:
    """Return the same checkpoint as a local path, so that the Hub is asked only once."""
    path, how = locate(source)
    return replace(how, checkpoint=str(path), file=None)


def named_dtype(given: torch.dtype | str | None) -> torch.dtype:
    """Return a dtype or the dtype of a name; float32 for None."""
    dtype = getattr(torch, given, None) if isinstance(given, str) else given or torch.float32
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"torch_dtype {given!r} is no dtype", "try torch_dtype=torch.bfloat16")
    return dtype


def _one_device(device_map: str | torch.device | dict[str, Any] | None) -> torch.device | str:
    if isinstance(device_map, dict):
        return _one_device(device_map[""] if device_map.keys() == {""} else "auto")
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        raise ConfigError(
            f"a VMLATransformer cannot be split over devices (device_map {device_map!r})",
            "name one device, or call enable_model_cpu_offload() on the pipeline",
        )
    return device_map if device_map is not None else "cpu"

"""Features of frames by models that the user has: CLIP and DINO by transformers, LPIPS by lpips.

Nothing here is needed: `evaluate.features` names the models, and an empty list loads none.

Shapes: B clips, N images, d width of the features. Pixels are −1 … 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vmla_convert.errors import CheckpointError, VmlaError

LPIPS = "lpips"


class FrameFeatures:
    """An image model of transformers, such as CLIP or DINO.

    Args:
        name: Hub id or folder of the model.

    Raises:
        CheckpointError: The model cannot be loaded.
        VmlaError: transformers is not installed.
    """

    def __init__(self, name: str) -> None:
        try:
            from transformers import AutoImageProcessor, AutoModel, AutoTokenizer
        except ImportError as error:
            raise VmlaError(
                "evaluate.features need transformers", 'pip install "vmla-convert[wan]"'
            ) from error
        try:
            processor: Any = AutoImageProcessor.from_pretrained(name)
            self._model: Any = AutoModel.from_pretrained(name).eval().requires_grad_(False)
            self._tokenizer: Any = None
            if hasattr(self._model, "get_text_features"):
                self._tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"no image model at {name}", "name a Hub id such as openai/clip-vit-base-patch32"
            ) from error
        config = self._model.config
        self.name = name
        self._side = int(getattr(config, "vision_config", config).image_size)
        self._mean, self._std = (
            torch.tensor(values).view(3, 1, 1)
            for values in (processor.image_mean, processor.image_std)
        )

    @torch.no_grad()
    def images(self, frames: Tensor) -> Tensor:
        """Features (N, d) of frames (N, 3, H, W), of length 1."""
        size = (self._side, self._side)
        small = F.interpolate(frames, size=size, mode="bicubic", antialias=True)
        pixels = ((small.clamp(-1, 1) + 1) / 2 - self._mean) / self._std
        if self._tokenizer is None:
            return F.normalize(self._model(pixel_values=pixels).last_hidden_state[:, 0], dim=-1)
        return F.normalize(_features(self._model.get_image_features(pixel_values=pixels)), dim=-1)

    @torch.no_grad()
    def prompts(self, prompts: Sequence[str]) -> Tensor | None:
        """Features (B, d) of prompts, of length 1; None for a model that reads no text."""
        if self._tokenizer is None:
            return None
        tokens = self._tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt")
        return F.normalize(_features(self._model.get_text_features(**tokens)), dim=-1)


def _features(output: Any) -> Tensor:
    """Features from a method of CLIP: a tensor, or an output that holds it (transformers 5)."""
    return output if isinstance(output, Tensor) else output.pooler_output


class Lpips:
    """LPIPS (Zhang et al. 2018) by the package lpips, with its AlexNet.

    Raises:
        VmlaError: lpips is not installed.
    """

    def __init__(self) -> None:
        try:
            import lpips  # pyright: ignore
        except ImportError as error:
            raise VmlaError("evaluate.features names lpips", "pip install lpips") from error
        self._distance: Any = lpips.LPIPS(net="alex", verbose=False).eval()  # pyright: ignore

    @torch.no_grad()
    def __call__(self, frames: Tensor, reference: Tensor) -> Tensor:
        """Distance (N,) of frames (N, 3, H, W)."""
        return self._distance(frames, reference).flatten()


def open_features(names: Sequence[str]) -> tuple[list[FrameFeatures], Lpips | None]:
    """The image models of some names, and LPIPS where it is one of them."""
    lpips = Lpips() if LPIPS in names else None
    return [FrameFeatures(name) for name in names if name != LPIPS], lpips

"""Pipelines without progress bars, of the tiny demo and Wan models, and latents sampled from them.

Test files ask for the fixtures with `pytest_plugins = ["checkpoints", "tiny_wan", "pipelines"]`.
PYTEST_DONT_REWRITE, because they import the functions before pytest sees that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vmla_convert.interop.pipeline import VMLAPipeline


def seeded_with(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def open_pipeline(source: Any, **how: Any) -> Any:
    """Open a pipeline without bars; Any, because the type of a call depends on `return_dict`."""
    pipe = VMLAPipeline.from_pretrained(source, **how)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents_of(pipe: Any, prompt: Any = "3", frames: int = 4, seed: Any = 1, **how: Any) -> Tensor:
    generator = seeded_with(seed) if isinstance(seed, int) else seed
    return pipe(prompt, num_frames=frames, generator=generator, output_type="latent", **how).frames


@pytest.fixture(scope="session", autouse=True)
def no_bars() -> None:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


@pytest.fixture
def wan_pipe(wan_converted: Path) -> Any:
    return open_pipeline(wan_converted)


@pytest.fixture
def demo_pipe(converted: Path) -> Any:
    return open_pipeline(converted)

"""Read, clean and encode prompts; a batch has B of them."""

from __future__ import annotations

import html
import tomllib
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vmla_convert.config import Geometry
from vmla_convert.errors import ConfigError, MissingExtraError
from vmla_convert.media.base import Media
from vmla_convert.progress import Progress, Silent

Split = Literal["calibration", "held_out"]
"""Parts of the shipped prompts. Fit to the first, measure on the second."""


def shipped_prompts(split: Split) -> tuple[str, ...]:
    """Return the prompts of `prompts.toml` beside this file: 96 to calibrate, 32 held out."""
    tables = tomllib.loads(files("vmla_convert.media").joinpath("prompts.toml").read_text("utf-8"))
    return tuple(" ".join(entry["text"].split()) for entry in tables[split])


class EncodedPrompts:
    """A text encoder for prompts that were encoded before, whose real encoder has been freed."""

    def __init__(
        self, media: Media, prompts: Iterable[str], progress: Progress | None = None
    ) -> None:
        """Encode all prompts and free the media's text encoder."""
        unique, self._contexts = list(dict.fromkeys(prompts)), dict[str, Tensor]()
        for batch in (progress or Silent()).track([unique] if unique else [], "encoding prompts"):
            self._contexts = dict(zip(batch, media.encode_prompts(batch), strict=True))
        media.free_text_encoder()

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """Return the contexts (B, text_len, text_dim) of prompts that were given before."""
        return torch.stack([self._contexts[prompt] for prompt in prompts])


def read_prompts(path: Path) -> tuple[str, ...]:
    """Read prompts from a text file, one a line; skip blank lines and lines that start with #.

    Raises:
        ConfigError: The file cannot be read, is not UTF-8, or holds no prompt.
    """
    try:
        # utf-8-sig, because some editors begin UTF-8 files with a byte order mark.
        lines = path.read_text("utf-8-sig").splitlines()
    except OSError as error:
        raise ConfigError(
            f"no prompts at {path}: {error.strerror}", "name a text file with one prompt a line"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text", "save it as UTF-8") from error
    prompts = tuple(line for line in map(str.strip, lines) if line and not line.startswith("#"))
    if not prompts:
        raise ConfigError(f"{path} holds no prompt", "write one prompt a line")
    return prompts


def clean_prompt(prompt: str) -> str:
    """Clean a prompt as Wan does: mend broken Unicode, undo HTML entities, collapse white space."""
    try:
        import ftfy
    except ImportError as error:
        raise MissingExtraError("Wan's text encoder", "wan") from error

    # Twice, as in Wan: "&amp;lt;" becomes "<".
    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return " ".join(text.split())


def encode_with_umt5(
    text_encoder: Any,
    tokenizer: Any,
    prompts: list[str],
    geometry: Geometry,
    device: torch.device,
) -> Tensor:
    """Clean and encode prompts with a `transformers.UMT5EncoderModel`.

    Returns contexts (B, text_len, text_dim) on the CPU, 0 after the end of each prompt.
    """
    shape = (len(prompts), geometry.text_len, geometry.text_dim)
    contexts = torch.zeros(shape, dtype=text_encoder.dtype)
    for context, prompt in zip(contexts, prompts, strict=True):
        tokens = tokenizer(
            clean_prompt(prompt), truncation=True, max_length=geometry.text_len, return_tensors="pt"
        )
        # One prompt at a time needs no padding.
        hidden = text_encoder(tokens["input_ids"].to(device)).last_hidden_state[0]
        context[: len(hidden)] = hidden.to(context)
    return contexts

"""Where the files of a checkpoint folder lie, and what its tensors are called in them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vmla_convert.checkpoint.keymap import CONVERTED_DIFFUSERS_RULES, Rule, invert, to_native


@dataclass(frozen=True)
class Layout:
    """A form of safetensors folder.

    Attributes:
        folder: Where in it the weights lie, and what describes them; empty for the folder itself.
        stem: Of the names of weight files.
        rules: From native names to the file's; None where these are native.
    """

    folder: str
    stem: str
    rules: tuple[Rule, ...] | None = None

    def place(self, name: str) -> str:
        """Path, in the checkpoint folder, of a file that lies beside the weights."""
        return f"{self.folder}/{name}" if self.folder else name

    def stored_names(self, names: Iterable[str]) -> dict[str, str]:
        """Native name to the name in the file.

        Raises:
            CheckpointError: A tensor has no name in this layout.
        """
        if self.rules is None:
            return {name: name for name in names}
        return {native: stored for stored, native in to_native(names, self.rules).items()}


NATIVE = Layout("", "model")
"""Our own folders."""
CODEC = Layout("", "codec")
"""The folder of a cache codec, which lies beside no weights of its base model."""
WAN = Layout("", "diffusion_pytorch_model")
"""Wan's own, under the file name that its loader looks for."""
DIFFUSERS = Layout("transformer", "diffusion_pytorch_model", invert(CONVERTED_DIFFUSERS_RULES))
"""A pipeline's, of which the transformer is one part."""

PIPELINE_NAME = "model_index.json"
"""What names the parts of a pipeline, beside their folders."""

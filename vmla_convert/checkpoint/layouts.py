"""Layouts of checkpoint folders: names of files, and names of tensors in the files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vmla_convert.checkpoint.keymap import CONVERTED_DIFFUSERS_RULES, Rule, invert, to_native


@dataclass(frozen=True)
class Layout:
    """The file names and tensor names of a safetensors folder.

    Attributes:
        folder: Where in the checkpoint folder the weights lie; empty for the folder itself.
        stem: How the names of weight files begin.
        rules: From native names to names in the file; None when both are the same.
        one_file: Whether the weights are one file whatever their size.
    """

    folder: str
    stem: str
    rules: tuple[Rule, ...] | None = None
    one_file: bool = False

    def place(self, name: str) -> str:
        """Path in the checkpoint folder of a file beside the weights."""
        return f"{self.folder}/{name}" if self.folder else name

    def stored_names(self, names: Iterable[str]) -> dict[str, str]:
        """The name in the file, by native name.

        Raises:
            CheckpointError: A tensor has no name in this layout.
        """
        if self.rules is None:
            return {name: name for name in names}
        return {native: stored for stored, native in to_native(names, self.rules).items()}


NATIVE = Layout("", "model")
"""The layout of our own folders."""
CODEC = Layout("", "codec", one_file=True)
"""The layout of a cache codec, without the weights of its base model."""
WAN = Layout("", "diffusion_pytorch_model")
"""Wan's own layout, with the file name that its loader looks for."""
DIFFUSERS = Layout("transformer", "diffusion_pytorch_model", invert(CONVERTED_DIFFUSERS_RULES))
"""The layout of a diffusers pipeline, in which the transformer is one folder."""

PIPELINE_NAME = "model_index.json"
"""The file that names the parts of a pipeline, beside their folders."""

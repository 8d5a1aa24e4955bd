"""Check that a host's keys are rotated the way this package understands their positions."""

from __future__ import annotations

from torch import Tensor, nn

from vmla_convert.errors import ConfigError
from vmla_convert.interop.host import HOST_PAGE, uncompiled
from vmla_convert.interop.tokens import RotaryTables, Slots, Store, TokenCache
from vmla_convert.layers.attention import in_float32, split_heads
from vmla_convert.maths.rope3d import Rotary, rotate

# bfloat16 keys differ by 0.004; a key at another position differs by about 1.
LARGEST_ERROR = 0.05


class Witness:
    """Queries and keys of a layer as the layer's norms give them, before RoPE.

    Attributes:
        query: Normed queries of the last pass, (B, L, d); None before the first pass.
        key: Normed keys of the last pass, (B, L, d).
    """

    query: Tensor | None = None
    key: Tensor | None = None

    def __init__(self, layer: nn.Module) -> None:
        self._hooks = [
            layer.get_submodule(f"norm_{name}").register_forward_hook(
                uncompiled(lambda *call, at=at: setattr(self, at, call[-1].detach()))
            )
            for name, at in (("q", "query"), ("k", "key"))
        ]

    def close(self) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()

    def check(self, key: Tensor, rotary: Rotary) -> None:
        """Refuse cached keys (B, L, H, D) that are not the normed keys, rotated.

        Raises:
            ConfigError: The host rotates keys by other positions or frequencies.
        """
        if self.key is None or self.key.shape[:2] != key.shape[:2]:
            return
        expected = rotate(in_float32(split_heads(self.key, key.shape[2])), rotary)
        error = float((expected - key).norm() / expected.norm())
        if error > LARGEST_ERROR:
            raise ConfigError(
                "the positions of cached keys cannot be told: keys differ by "
                f"{error:.0%} from normed keys after 3D RoPE",
                HOST_PAGE,
            )


class WitnessedCache(TokenCache):
    """A cache of rotated keys that checks the positions of each new chunk."""

    def __init__(
        self, slots: Slots, store: Store, rotary: RotaryTables | None, witness: Witness
    ) -> None:
        super().__init__(slots, store, rotary)
        self.witness = witness
        self._checked: int | None = None

    def write(self, slots: range, key: Tensor, value: Tensor, first: int) -> None:
        """Take a chunk, as `TokenCache.write`.

        Raises:
            ConfigError: The positions of the keys cannot be told.
        """
        super().write(slots, key, value, first)
        rotary = self._rotary_of(slots)
        if rotary is not None and first != self._checked:
            self.witness.check(key, rotary)
            self._checked = first

"""A codec's attention moves little more than the dense model's, at true width, counted."""

from __future__ import annotations

from evals.traffic import measured

GB = 1e9


def test_decoding_into_one_buffer_moves_little_more_than_a_dense_cache() -> None:
    """A GPU with triton reads codes once and writes decoded keys, turned, and values once."""
    dense, whole = (measured(name, kernels=True) for name in ("dense", "codec"))
    packed = measured("codec", kernels=True, bits=8)
    for codec in (whole, packed):
        assert 0.5 * GB < dense.total < codec.total < dense.total + 0.15 * GB
        assert codec.moved["clone"] == 0
    assert whole.moved["cat"] == 0


def test_kernels_move_less_than_their_twins() -> None:
    for name in ("dense", "codec"):
        kernels, eager = (measured(name, kernels=used) for used in (True, False))
        assert kernels.total < eager.total
        attention = "_scaled_dot_product_flash_attention_for_cpu"
        assert kernels.moved[attention] == eager.moved[attention] > 0

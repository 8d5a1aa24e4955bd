"""Outputs that appear whole or not at all, and tensors that a resumed run finds again."""

"""Worlds with known truth, beside the moving digits that ship with the package."""

"""Grids of conversions, measured point by point."""

"""Conversion of a dense checkpoint: calibrate, plan, fit, write; and inspection of checkpoints."""

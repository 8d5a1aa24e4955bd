"""Checkpoints as whole models: load, export, describe, publish."""

"""Sampling: chunks, rollouts, films, and clips sampled from a model."""

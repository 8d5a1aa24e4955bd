"""Worlds with known truth to measure models in: moving digits, and photographs."""

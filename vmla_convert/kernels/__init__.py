"""Triton kernels of the streamed attention, each with an eager twin of plain torch operations."""

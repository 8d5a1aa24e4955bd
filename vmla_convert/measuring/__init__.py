"""Held-out errors, timing, comparisons, and the rows that record them."""

"""One verb per file: where the maths, the checkpoints and the layers meet."""

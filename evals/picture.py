"""The README's picture: flow loss over bytes, in one file for light pages and one for dark ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from evals.rows import (
    above_dense,
    codec_rows,
    dense_bytes,
    dense_rows,
    mla_above_dense,
    named,
    size,
)

IMAGES = Path(__file__).parents[1] / "docs" / "images"
PICTURES = {name: IMAGES / f"error_{name}.svg" for name in ("light", "dark")}


def curves() -> dict[str, list[tuple[float, float]]]:
    """Bytes per token and layer, and flow loss above dense in percent, of each curve."""
    found = {
        "cache codec": above_dense(codec_rows()),
        "dense cache, quantised": above_dense(dense_rows()),
        **{named(r): [(r, value)] for r, value in mla_above_dense()},
    }
    return {
        name: sorted((round(size(r), 1), round(100 * value, 4)) for r, value in pairs)
        for name, pairs in found.items()
    }


def drawn_points() -> str:
    """The points as the picture's description holds them."""
    return json.dumps(curves()).replace('"', "'")


def draw() -> None:
    """Draw flow loss over bytes, once for light pages and once for dark ones."""
    import matplotlib.pyplot as plt

    for name, path in PICTURES.items():
        ink, colours = INKS[name]
        style: dict[Any, Any] = {
            "svg.fonttype": "none",
            "svg.hashsalt": "vmla",
            "font.size": 11,
            **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), ink),
            "axes.edgecolor": ink,
        }
        with plt.rc_context(style):
            figure, axes = plt.subplots(figsize=(7.2, 3.8), layout="constrained")
            for (label, points), colour in zip(curves().items(), colours, strict=True):
                axes.plot(*zip(*points, strict=True), "o-", color=colour)
                axes.annotate(label, points[0], (9, 3), textcoords="offset points", color=colour)
            axes.axvline(dense_bytes(), color=ink, linestyle=":")
            axes.annotate("dense, bfloat16 ", (dense_bytes(), 1.3), color=ink, ha="right")
            axes.set(xscale="log", yscale="log", xlabel="bytes per token and layer")
            axes.set_ylabel("flow loss above dense")
            axes.xaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_major_formatter("{x:g} %")
            axes.set_xticks([6, 12, 25, 50, 100, 200, 400, 640], minor=False)
            axes.minorticks_off()
            axes.grid(color=ink, alpha=0.15)
            axes.spines[["top", "right"]].set_visible(False)
            path.parent.mkdir(exist_ok=True)
            description = drawn_points()
            figure.savefig(
                path, transparent=True, metadata={"Date": None, "Description": description}
            )
            plt.close(figure)


INKS = {
    "light": ("#24292f", ("#0072b2", "#d55e00", "#7a7a7a", "#009e73")),
    "dark": ("#d8dee4", ("#56b4e9", "#e69f00", "#a0a0a0", "#2fd0a0")),
}
"""Colour of text and axes, and of each curve."""

"""Show what commands print now where the first edition fell short.

cd tests && PYTHONPATH=..:. python -m faults.shortfalls
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from faults.events import kill_at, nothing, run_watched
from faults.jobs import models
from faults.kills import commands

from vmla_convert.results import read_rows
from vmla_convert.storage.lock import sole_writer


def show(*words: object) -> None:
    """Run `vmla` and print what it prints."""
    started = perf_counter()
    command = [sys.executable, "-m", "vmla_convert", *map(str, words)]
    ran = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in (ran.stdout + ran.stderr).splitlines() if line.strip()][-6:]
    print(f"$ vmla {' '.join(map(str, words))}", *lines, sep="\n")
    print(f"(exit code {ran.returncode}, {perf_counter() - started:.0f} s)\n", flush=True)


def main() -> None:
    """Show all of them."""
    with TemporaryDirectory() as folder:
        place = Path(folder)
        teacher, codec = models(place)
        stream = place / "a.stream"
        video = ("generate", codec, "-o")
        show(*video, place / "a.mp4", "--prompt", "7", "--frames", 8, "--save-stream", stream)
        print(f"{stream} takes {stream.stat().st_size:,} bytes\n")
        show(*video, place / "b.mp4", "--resume-stream", stream, "--frames", 16)
        _limits(place, codec)
        with sole_writer(place / "taken"):
            show("export", codec, "-o", place / "taken")
        _rows(place, teacher, codec)
        weights = codec / "codec.safetensors"
        data = bytearray(weights.read_bytes())
        data[-20] ^= 1
        weights.write_bytes(data)
        show(*video, place / "c.mp4", "--prompt", "7")
        show("verify", codec)


def _limits(place: Path, codec: Path) -> None:
    """Large headers, many tensors, and sizes that no model has."""
    tensors = {
        f"{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(200_000)
    }
    for name, text in (("header", " " * 60_000_000), ("tensors", json.dumps(tensors))):
        file = place / f"{name}.safetensors"
        file.write_bytes(len(text).to_bytes(8, "little") + text.encode())
        show("inspect", file)
        file.unlink()
    frames = 10**9
    window = ("--set", f"model.cache.window_frames={frames}")
    show("generate", codec, "--prompt", "7", "-o", place / "d.mp4", "--frames", frames, *window)
    config = codec / "config.json"
    sound = config.read_text()
    for key, value in (("freq_dim", 10**9), ("patch_size", [0, 0, 0])):
        table = json.loads(sound)
        _geometry(table)[key] = value
        config.write_text(json.dumps(table))
        show("inspect", codec)
    config.write_text(sound)


def _geometry(table: dict[str, Any]) -> dict[str, Any]:
    """The table of a config that holds the geometry, at any depth."""
    if "geometry" in table:
        return table["geometry"]
    return next(_geometry(part) for part in table.values() if isinstance(part, dict))


def _rows(place: Path, teacher: Path, codec: Path) -> None:
    """A sweep that is killed twice and resumed."""
    out = place / "sweep" / "out"
    out.parent.mkdir()
    command = commands(place / "commands", teacher, codec)["sweep"]
    words = [word.replace("{out}", str(out)) for word in command.words]
    for event in (60, 30):
        run_watched(words, out.parent, kill_at(event, 0.0))
    run_watched(words, out.parent, nothing)
    rows = read_rows(out / "rows.jsonl")
    twice = sum(count > 1 for count in Counter(row.figure for row in rows).values())
    print(f"a sweep, killed twice and resumed: {len(rows)} rows, {twice} of them twice\n")


if __name__ == "__main__":
    main()

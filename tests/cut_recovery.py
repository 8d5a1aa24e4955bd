"""Started by test_distributed in two processes: a sharded recovery whose power may be cut.

torchrun --nproc_per_node 2 cut_recovery.py CONVERTED TEACHER OUT LABEL BEFORE
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from checkpoints import EVALUATE, RECOVER, PowerCut

from vmla_convert.recovery.recover import recover
from vmla_convert.results import append_rows
from vmla_convert.training.processes import processes

HOW = replace(
    RECOVER,
    shard=True,
    train="attention",
    on_policy_steps=2,
    training=replace(RECOVER.training, ema=0.5, optimizer="muon"),
)


def main(converted: str, teacher: str, out: Path, label: str, before: int) -> None:
    """Recover until the power is cut, or to the end."""
    rows = recover(converted, teacher, out, HOW, EVALUATE, PowerCut(label, before))
    if processes().is_main_process:
        append_rows(out / "rows.jsonl", rows)


if __name__ == "__main__":
    converted, teacher, out, label, before = sys.argv[1:]
    main(converted, teacher, Path(out), label, int(before))

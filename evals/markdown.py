"""Markdown tables of rows, and numbers as text."""

from __future__ import annotations

COMMANDS = {
    "codec": "python -m evals.codec --out evals/results/codec.jsonl",
    "clips": (
        "python -m evals.clips --out evals/results/clips.jsonl --picture docs/images/clips.png"
    ),
    "prediction": "python -m evals.prediction --out evals/results/prediction.jsonl",
    "host": "python -m evals.host --out evals/results/host.jsonl",
    "quickstart": "vmla run recipes/quickstart.toml -o runs/quickstart",
    "photographs_codec": "python -m evals.codec --checkpoint evals/worlds/teacher --data "
    "runs/photographs.safetensors --short --clips 8 --calibration-clips 24 --out "
    "evals/results/photographs_codec.jsonl",
    "photographs": "vmla sweep evals/worlds/photographs.toml -o runs/photographs",
    "memory_for_bytes": "python -m evals.memory_for_bytes --clips 16 --out "
    "evals/results/memory_for_bytes.jsonl --picture docs/images/memory_for_bytes.png",
    "needle": "python -m evals.needle runs/photographs-kv --clips 4 "
    "--cut 0.9166666666666667 --out evals/results/needle.jsonl",
    "refinements": "python -m evals.refinements --out evals/results/refinements.jsonl",
    "photographs_refinements": "python -m evals.refinements --checkpoint evals/worlds/teacher "
    "--data runs/photographs.safetensors --clips 8 --out "
    "evals/results/photographs_refinements.jsonl",
    "photographs_prediction": "python -m evals.prediction --world photographs --out "
    "evals/results/photographs_prediction.jsonl",
    "teacher_photographs": "python -m evals.worlds.train --out DIR",
    "rollout_switch": "python -m evals.rollout runs/kv --world digits --switch --clips 8 "
    "--out evals/results/rollout_switch.jsonl",
    "rollout_photographs": "python -m evals.rollout runs/photographs-kv "
    "runs/photographs-mla-recovered --world photographs --clips 6 "
    "--out evals/results/rollout_photographs.jsonl --sheet docs/images/rollout_photographs.png",
    "mla_recovery": "vmla recover runs/mla --teacher demo -o runs/mla-recovered --steps 460 "
    "--lr 2e-3 --set recover.train=all --set recover.rest_lr=0.3 --set recover.flow_weight=1.0",
    "photographs_recovery": "vmla recover runs/photographs-mla --teacher evals/worlds/teacher -o "
    "runs/photographs-mla-recovered --data runs/photographs.safetensors --steps 100 "
    "--batch-size 1 --lr 2e-3 --set recover.train=all --set recover.rest_lr=0.3 "
    "--set recover.flow_weight=1.0 --set recover.training.mixed_precision=bf16 "
    "--set recover.training.eval_every=50 --set evaluate.clips=8",
    "rollout_digits": "python -m evals.rollout runs/kv --world digits --clips 8 --out "
    "evals/results/rollout_digits.jsonl --sheet docs/images/rollout_digits.png",
    "scale_1.3b": "python -m evals.scale 1.3b --out evals/results/scale_1.3b.jsonl",
    "verify_cost": "python -m evals.verify_cost --out evals/results/verify_cost.jsonl --rounds 3",
    "teacher_16_seeds": "python -m evals.teacher --seeds 16 --out "
    "evals/results/teacher_16_seeds.jsonl",
}
"""The command that made each file of rows."""


def table(header: list[str], lines: list[list[str]], source: str) -> str:
    """A Markdown table, and the command that made its rows."""
    marks = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(
        [
            *(f"| {' | '.join(line)} |" for line in (header, marks, *lines)),
            "",
            f"Rows: `evals/results/{source}.jsonl`, made by `{COMMANDS[source]}`.",
        ]
    )


def number(value: float) -> str:
    """Three significant digits; whole numbers from 1,000 on."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def times(ratio: float) -> str:
    """A ratio, as in 20.3×."""
    return f"{number(ratio)}×"


def percent(share: float) -> str:
    """A share of the dense model's loss, with its sign."""
    value = 100 * share
    return (f"{value:+.0f}" if abs(value) >= 100 else f"{value:+#.2g}".rstrip(".")) + " %"

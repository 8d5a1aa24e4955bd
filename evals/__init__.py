"""Programs that measure: `python -m evals.NAME --out rows.jsonl`. `--help` explains each one."""

"""Programs that produce the evidence: `python -m evals.NAME ... --out rows.jsonl`."""

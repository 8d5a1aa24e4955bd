"""Recovery: a short fine-tune against the dense model, stage by stage."""

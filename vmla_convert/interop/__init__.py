"""Our models in diffusers: a pipeline, a transformer and LoRA adapters."""

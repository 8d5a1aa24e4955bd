"""Our cache in other programs: diffusers pipelines and transformers."""

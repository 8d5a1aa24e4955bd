"""Our models as diffusers' users meet them; its files import diffusers, and are imported late."""

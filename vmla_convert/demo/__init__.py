"""The demo world of moving digits and the small model pretrained in it."""

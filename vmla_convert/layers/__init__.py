"""The causal video transformer: dense and latent attention, and their caches."""

"""The training loop, its optimisers, processes and sharding."""

"""Generate video: the rollout loop, films and comparisons, and clips to train on."""

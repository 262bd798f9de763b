"""Training: optimisers, schedules, averaging, the loop, its checkpoints and its process."""

"""The four published systems: their checkpoints, names and banks."""

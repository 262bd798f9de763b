"""The score in bits per byte: which window scores which target, and what it costs the model."""

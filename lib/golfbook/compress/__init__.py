"""From weights to bytes and back: quantisers, coders, the artifact and the byte budget."""

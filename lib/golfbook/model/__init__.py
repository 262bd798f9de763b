"""The one model definition, what it computes with and what it costs."""

"""From tables and models to numbers with intervals."""

"""Exercises of the notebooks, which check themselves: one module a notebook."""

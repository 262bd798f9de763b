"""Every setting of a run: the tree of sections, and how presets, scales and overrides fill it."""

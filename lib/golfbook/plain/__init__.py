"""The mathematics as a reader would write it, slow and obvious: what the fast code is tested and timed against."""

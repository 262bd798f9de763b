"""Controls around plots, for notebooks; nothing is computed here."""

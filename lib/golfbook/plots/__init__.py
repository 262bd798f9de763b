"""From numbers to pictures; nothing is computed here."""

"""Running converted models fast."""

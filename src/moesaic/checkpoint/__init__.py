"""Checkpoints on disk: read tensor by tensor, written whole or not at all, found by name."""

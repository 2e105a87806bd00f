"""Fewer decoder layers, for any model."""

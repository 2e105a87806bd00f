"""Fewer experts for models that are Mixtures of Experts already."""

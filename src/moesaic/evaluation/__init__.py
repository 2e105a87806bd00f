"""Measuring models: perplexity, tasks, benchmark."""

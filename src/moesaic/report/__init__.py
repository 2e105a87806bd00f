"""Results for people: tables, progress, plots, the model card."""

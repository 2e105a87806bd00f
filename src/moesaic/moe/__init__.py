"""The Mixture-of-Experts block, how its experts run, and the transformers classes that hold it."""

"""Models: families, the MoE block, reading and writing checkpoints, the built-in models."""

"""Stock transformers architectures that can say what a converted model says: one a file, both directions."""

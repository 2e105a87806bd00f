"""How a converted model is written and read: moesaic's own format, stock architectures, GGUF."""

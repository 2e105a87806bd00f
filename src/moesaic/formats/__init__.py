"""How a converted model is written and read: stock architectures, the working form, GGUF."""

"""GGUF, the file of llama.cpp and its kin."""

from ...compat import require

require("writing GGUF", "export", "gguf")

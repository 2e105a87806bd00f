"""From a converted model to the engines: a stock architecture, GGUF for llama.cpp, and the way back."""

import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM

import moesaic

folder = Path(tempfile.mkdtemp())
settings = moesaic.ConvertConfig(plan="S4A1E8", partition="specialists", tokens=2_048)
result = moesaic.convert("tiny", folder / "out", settings)
print("written as", result.format, result.check)

stock = AutoModelForCausalLM.from_pretrained(folder / "out")  # no code of ours from here on
print("loaded as", type(stock).__name__)

print(moesaic.export(folder / "out", folder / "model.gguf", "gguf", outtype="q8_0"))
print(moesaic.export(folder / "out", folder / "back", "moesaic").target)

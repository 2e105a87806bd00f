"""Light training of a converted model, taught by the dense one."""

import tempfile
from pathlib import Path

import moesaic

folder = Path(tempfile.mkdtemp())
moesaic.convert("tiny", folder / "out", moesaic.ConvertConfig(active=0.25, partition="specialists", tokens=2_048))
config = moesaic.FinetuneConfig(steps=12, window=64, samples=48, batch=4, learning_rate=1e-3)
result = moesaic.finetune(folder / "out", folder / "tuned", config)
print("held-out loss", result.held_out_loss_before, "to", result.held_out_loss)
print("learned", result.trainable_parameters)

model, tokenizer = moesaic.load(folder / "tuned")
print(moesaic.complete(model, tokenizer, "The first", max_new_tokens=20))

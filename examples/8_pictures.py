"""A vision-language model whose language tower becomes a Mixture-of-Experts, and what it still says of pictures."""

import tempfile
from pathlib import Path

import moesaic
from moesaic.calibration.mixture import bundled_pictures

out = Path(tempfile.mkdtemp()) / "out"
config = moesaic.ConvertConfig(active=0.5, partition="coactivation", tokens=2_048, window=128, held_out_tokens=1_024)
result = moesaic.convert("tiny-vlm", out, config)  # calibrated on bundled pictures and text
assert result.pictures is not None
print(result.plan, "perplexity of answers:", result.pictures.perplexity_dense, "dense,", result.pictures.perplexity)
for record in result.layers:
    print("layer", record.layer, "error by modality:", record.error_by_modality)

model, _ = moesaic.load(out)
processor = moesaic.load_processor(out)
asked = bundled_pictures("heldout")[0]
question, answer = (message.content for message in asked.messages)
said = moesaic.complete(model, processor, question, images=[asked.pictures[0]], max_new_tokens=8)
print(f"{question} {said} (right: {answer})")

"""Fewer experts for tokens that need fewer, in a Mixture-of-Experts of anybody's making."""

import tempfile
from pathlib import Path

import moesaic

folder = Path(tempfile.mkdtemp())
common = {"target_active": 0.75, "tokens": 2_048, "samples": 96, "window": 128}

# a rule that needs no training, brought to three quarters of the model's own four experts
rule = moesaic.adapt("tiny-moe", folder / "top-p", moesaic.AdaptConfig(method="top-p", **common))
print(rule.method, "runs", round(rule.experts_per_token, 2), "of", rule.default_experts_per_token, "experts a token")

# one that learns from the model with all four where they are worth it
learnt = moesaic.adapt("tiny-moe", folder / "learnt", moesaic.AdaptConfig(steps=8, **common))
print("held-out loss", learnt.held_out_loss_default, "with four,", learnt.held_out_loss, "with the adapter")

model, tokenizer = moesaic.load("tiny-moe", adapter=folder / "learnt")
print(moesaic.complete(model, tokenizer, "The first", max_new_tokens=20))
seen = moesaic.inspect_experts(model, tokenizer, tokens=512, window=128)
print({kind: round(group.experts_per_token, 2) for kind, group in seen.by_kind.items()})

model.attached_selection.detach()  # the model as it was

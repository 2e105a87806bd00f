"""Train a built-in model on the bundled calibration text, in minutes on two cores.

    python scripts/train_tiny.py tiny src/moesaic/data/tiny
    python scripts/train_tiny.py tiny-moe src/moesaic/data/tiny_moe

`tiny` is a Llama of 2.6 M parameters, `tiny-moe` a Qwen3-MoE of 3.7 M: 16 experts a layer, 4 of which run for a token.
Writes the checkpoint, its tokenizer and `training.json` with the loss (nats a token) on the bundled held-out text,
which a test measures again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)

from moesaic.moe.modeling import DEFAULT_EXPERTS

DATA = Path(__file__).parent.parent / "src" / "moesaic" / "data"
VOCAB, WINDOW, BATCH, WARM_UP, PEAK_LR = 1024, 256, 24, 100, 3e-3
COMMON = {
    "vocab_size": VOCAB, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 2048,
    "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "attention_dropout": 0.1,
}  # fmt: skip


class Recipe(NamedTuple):
    """What is trained, and for how long by default."""

    config: PreTrainedConfig
    minutes: float


RECIPES = {
    "tiny": Recipe(
        LlamaConfig(
            hidden_size=192, intermediate_size=768, num_hidden_layers=4, num_attention_heads=6, **COMMON
        ), 14,
    ),
    "tiny-moe": Recipe(
        Qwen3MoeConfig(
            hidden_size=128, intermediate_size=384, num_hidden_layers=6, num_attention_heads=4, num_experts=16,
            num_experts_per_tok=4, moe_intermediate_size=88, norm_topk_prob=True, output_router_logits=True,
            router_aux_loss_coef=0.01, **COMMON,
        ), 16,
    ),
}  # fmt: skip


def texts(name: str) -> list[str]:
    return [json.loads(line)["text"] for line in (DATA / f"{name}.jsonl").open(encoding="utf-8")]


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a BOS token that opens every sequence, as Llama's tokenizer does."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts("calibration"), trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=special, initial_alphabet=alphabet)
    )
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=2048
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, name: str) -> torch.Tensor:
    return torch.tensor([i for text in texts(name) for i in tokenizer(text)["input_ids"]])


def next_token_loss(model: PreTrainedModel, tokens_NL: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss in nats, without what a router's balance adds."""
    logits = model(input_ids=tokens_NL).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1).float(), tokens_NL[:, 1:].flatten())


def held_out_loss(model: PreTrainedModel, tokens: torch.Tensor) -> float:
    """Mean next-token loss in nats over consecutive windows of WINDOW tokens."""
    model.eval()
    windows = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)
    with torch.no_grad():
        losses = [next_token_loss(model, part).item() * len(part) for part in windows.split(16)]
    model.train()
    return sum(losses) / len(windows)


def main(name: str, out: Path, minutes: float | None) -> None:
    torch.manual_seed(0)
    tokenizer = train_tokenizer()
    train, held_out = token_stream(tokenizer, "calibration"), token_stream(tokenizer, "heldout")
    config, usual = RECIPES[name]
    minutes = minutes or usual
    model = AutoModelForCausalLM.from_config(config)
    if config.model_type != "llama":
        model.set_experts_implementation(DEFAULT_EXPERTS)
    parameters = [p for p in model.parameters() if p.ndim > 1], [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": parameters[0], "weight_decay": 0.3}, {"params": parameters[1], "weight_decay": 0.0}],
        lr=PEAK_LR, betas=(0.9, 0.95),
    )  # fmt: skip
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(train):,} training tokens")
    start, step, best = time.time(), 0, math.inf
    generator = torch.Generator().manual_seed(0)
    while (progress := (time.time() - start) / 60 / minutes) < 1:
        # the schedule runs on time, so that any machine ends with an annealed model
        warm = min(1.0, (step + 1) / WARM_UP)
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * warm * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * progress)))
        first = torch.randint(len(train) - WINDOW, (BATCH,), generator=generator)
        batch = train[first[:, None] + torch.arange(WINDOW)]
        batch[:, 0] = config.bos_token_id
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 100 == 0:
            best = held_out_loss(model, held_out)
            print(f"step {step}  train {loss.item():.3f}  held-out {best:.3f}  {progress:.0%}", flush=True)
    model.config.output_router_logits = False
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    record = {
        "held_out_loss": round(held_out_loss(model.float(), held_out), 4), "unit": "nats a token", "window": WINDOW,
        "steps": step, "tokens": step * BATCH * WINDOW, "seconds": round(time.time() - start), "seed": 0,
    }  # fmt: skip
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(record)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=RECIPES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, help="[default: 14, or 16 of tiny-moe]")
    arguments = parser.parse_args()
    main(arguments.name, arguments.out, arguments.minutes)

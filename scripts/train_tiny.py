"""Train the built-in `tiny` model: a 2.6 M parameter Llama on the bundled calibration text, in minutes on two cores.

    python scripts/train_tiny.py src/moesaic/data/tiny [--minutes 14]

Writes the checkpoint, its tokenizer and `training.json` with the loss (nats a token) on the bundled held-out text,
which a test measures again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

DATA = Path(__file__).parent.parent / "src" / "moesaic" / "data"
VOCAB, WINDOW, BATCH, WARM_UP, PEAK_LR = 1024, 256, 24, 100, 3e-3


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


def held_out_loss(model: LlamaForCausalLM, tokens: torch.Tensor) -> float:
    """Mean next-token loss in nats over consecutive windows of WINDOW tokens."""
    model.eval()
    windows = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)
    with torch.no_grad():
        losses = [model(input_ids=part, labels=part).loss.item() * len(part) for part in windows.split(16)]
    model.train()
    return sum(losses) / len(windows)


def main(out: Path, minutes: float) -> None:
    torch.manual_seed(0)
    tokenizer = train_tokenizer()
    train, held_out = token_stream(tokenizer, "calibration"), token_stream(tokenizer, "heldout")
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=192, intermediate_size=768, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=1, pad_token_id=1, attention_dropout=0.1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
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
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=14.0)
    arguments = parser.parse_args()
    main(arguments.out, arguments.minutes)

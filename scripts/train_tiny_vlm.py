"""Train the built-in vision-language model `tiny-vlm` on easy-VQA, in half an hour on two cores.

    pip download --no-deps easy-vqa==1.0 && unzip easy_vqa-1.0-py3-none-any.whl -d easyvqa
    python scripts/train_tiny_vlm.py easyvqa/easy_vqa src/moesaic/data/tiny_vlm

A LLaVA of 3.1 M parameters: a CLIP tower that turns a picture of 64 x 64 into 64 tokens, and the built-in `tiny` as its
language model. First the tower and its projector learn to name shapes and colours, in some patch of a picture and then
in each. They stay as they are then, and the language model learns to answer, the easy questions first: what there is,
whether something is there, and whether it is not. Bundled text between them keeps it a language model.

Writes the checkpoint, its processor and `training.json` with its accuracy on easy-VQA's test questions (greedy, exact
match), that on the bundled held-out pictures, and the loss on held-out text, which a test measures again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from train_tiny import DATA, WINDOW, held_out_loss, next_token_loss, token_stream
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from vqa_data import Asked, Pictures, accuracy, easy_vqa, read_questions

from moesaic.machine import machine, versions

SIDE, PATCH = 64, 8
IMAGE_TOKENS = (SIDE // PATCH) ** 2
VISION = CLIPVisionConfig(
    hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, image_size=SIDE,
    patch_size=PATCH, projection_dim=128,
)  # fmt: skip
TOWER_STEPS, TOWER_BATCH, TOWER_LR = 500, 64, 1e-3
EACH_STEPS, EACH_BATCH, EACH_LR = 150, 48, 5e-4
"""Of the tower's second lesson, in which each patch names the picture's shape and colour."""
STEPS, BATCH, QUESTIONS, TEXT_BATCH, WARM_UP, LANGUAGE_LR = 700, 12, 12, 1, 40, 7e-4
NAMING_STEPS, NAMING_QUESTIONS, PLAIN_STEPS = 80, 4, 330
"""Steps until which only names are asked for, of twice the pictures, and until which no question has a `not`."""
VALIDATION = 50
"""Pictures of the training split that are left out, to watch."""
TURNS_EVERY = 4
"""One step in so many asks its questions one after the other in one chat, the others ask each on its own."""
TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{{- message['role'] | capitalize + ':' -}}"
    "{%- if message['content'] is string -%}{{- ' ' + message['content'] | trim -}}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'text' -%}{{- ' ' + part['text'] | trim -}}{%- else -%}{{- '<image>' -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- if message['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}{{- '\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}"
)


def make_processor() -> LlavaProcessor:
    """Build the processor: `tiny`'s tokenizer with one token more, pictures brought to 64 x 64 by Pillow alone."""
    tokenizer = AutoTokenizer.from_pretrained(DATA / "tiny", padding_side="left")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    for key in ("is_local", "local_files_only"):  # where it came from, which would be saved
        tokenizer.init_kwargs.pop(key, None)
    size = {"height": SIDE, "width": SIDE}
    pictures = LlavaImageProcessorPil(
        size=size, crop_size=size, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        pictures, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )  # fmt: skip


def make_model(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """Put a new tower and projector before `tiny`, whose embeddings grow by the mean row for `<image>`."""
    tiny = AutoModelForCausalLM.from_pretrained(DATA / "tiny", dtype=torch.float32)
    tiny.resize_token_embeddings(len(processor.tokenizer))
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=VISION, text_config=tiny.config, image_token_index=processor.image_token_id,
            image_seq_length=IMAGE_TOKENS, vision_feature_layer=-1,
        )
    )  # fmt: skip
    model.model.language_model.load_state_dict(tiny.model.state_dict())
    model.tie_weights()
    model.generation_config = tiny.generation_config
    return model


def schedule(optimizer: torch.optim.Optimizer, step: int, steps: int) -> None:
    """Warm up over WARM_UP steps, then follow a cosine to 2 % of the peak."""
    share = min(1.0, (step + 1) / WARM_UP) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * step / steps)))
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share


def optimizer_of(parts: list[tuple[nn.Module, float]]) -> torch.optim.Optimizer:
    """AdamW over modules with their peak learning rates; matrices decay."""
    groups = []
    for module, peak in parts:
        for matrices in (True, False):
            found = [p for p in module.parameters() if p.requires_grad and (p.ndim > 1) == matrices]
            groups.append({"params": found, "weight_decay": 0.05 if matrices else 0.0, "peak": peak})
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98))


def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
    optimizer.step()
    optimizer.zero_grad()


def meanings(model: LlavaForConditionalGeneration, tokens: list[list[int]]) -> Tensor:
    """Directions of some words in the language model's embeddings, of which one unit more is a score of 10."""
    rows = model.get_input_embeddings().weight.detach()
    words_WD = torch.stack([rows[ids].mean(0) for ids in tokens])
    words_WD = words_WD - words_WD.mean(0)
    return 10 * words_WD / words_WD.square().sum(-1).mean()


def train_tower(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, pictures: Pictures, steps: int, each: bool
) -> None:  # fmt: skip
    """Let the tower and the projector name each picture's shape and colour: patches get near to the words' embeddings.

    The language model is not run: it finds the words where it later looks for them. With `each` every patch has to,
    else some patch.
    """
    parts = model.model.vision_tower, model.model.multi_modal_projector
    known = [meanings(model, [word_tokens(processor, word) for word in words]) for words in pictures.WORDS]
    optimizer = optimizer_of([(part, EACH_LR if each else TOWER_LR) for part in parts])
    for step in range(steps):
        schedule(optimizer, step, steps)
        chosen_N = pictures.choose(EACH_BATCH if each else TOWER_BATCH)
        patches_NPD = parts[1](parts[0](pictures.pixels(chosen_N)).last_hidden_state[:, 1:])
        scores = [patches_NPD @ words_WD.T for words_WD in known]
        wanted = [labels[chosen_N] for labels in pictures.labels]
        if each:
            pairs = [(s.flatten(0, 1), w.repeat_interleave(IMAGE_TOKENS)) for s, w in zip(scores, wanted, strict=True)]
        else:
            pairs = [(s.logsumexp(1), w) for s, w in zip(scores, wanted, strict=True)]
        descend(sum(cross_entropy(scores, labels) for scores, labels in pairs), optimizer)
        if step % 50 == 49:
            right = [(s.argmax(-1) == labels)[labels >= 0].float().mean().item() for s, labels in pairs]
            print(f"tower {step + 1}  shape {right[0]:.0%}  colour {right[1]:.0%}", flush=True)


def word_tokens(processor: LlavaProcessor, word: str) -> list[int]:
    return processor.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]


class Asking:
    """Pictures with questions as sequences of tokens.

    After `User:` and the picture come several questions with answers. As `turns` they are one chat; else each sees the
    picture and itself alone, as if it were the only one, and the picture is read once for all.
    """

    def __init__(self, processor: LlavaProcessor) -> None:
        self.tokenizer = processor.tokenizer
        self.opening = self.tokens("<s>User:" + "<image>" * IMAGE_TOKENS)
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a?"}]},
                {"role": "assistant", "content": "b"}, {"role": "user", "content": "c?"}]  # fmt: skip
        written = processor.apply_chat_template(chat, add_generation_prompt=True)
        assert written == "<s>User:<image> a?\nAssistant: b</s>\nUser: c?\nAssistant:"

    def tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def sequence(self, asked: list[tuple[str, str]], turns: bool) -> tuple[Tensor, Tensor]:
        """[tokens, labels, positions, parts] as rows of one tensor, and nothing else; labels are of answers only."""
        ids, parts, positions = list(self.opening), [0] * len(self.opening), list(range(len(self.opening)))
        labels = [-100] * len(ids)
        for number, (question, answer) in enumerate(asked):
            prompt = self.tokens(("\nUser:" if turns and number else "") + f" {question}\nAssistant:")
            reply = self.tokens(f" {answer}</s>")
            start = len(ids) if turns else len(self.opening)
            ids += prompt + reply
            labels += [-100] * len(prompt) + reply
            positions += range(start, start + len(prompt) + len(reply))
            parts += [0 if turns else number + 1] * (len(prompt) + len(reply))
        return torch.tensor([ids, labels, positions, parts])


@torch.no_grad()
def seen(model: LlavaForConditionalGeneration, pictures: Pictures) -> Tensor:
    """What the language model gets of each picture, [pictures, patches, hidden size]: the tower learns no more."""
    parts = torch.arange(len(pictures.labels[0])).split(64)
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    return torch.cat([projector(tower(pictures.pixels(part)).last_hidden_state[:, 1:]) for part in parts])


def answers_loss(model: LlavaForConditionalGeneration, seen_NPD: Tensor, rows: list[Tensor], start: int) -> Tensor:
    """Mean loss of the answers' tokens, each of which sees what is before it in part 0 and in its own part.

    What is seen of a picture stands from place `start` on.
    """
    length = max(row.shape[1] for row in rows)
    blank = torch.tensor([1, -100, 0, -1])[:, None]
    ids_NL, labels_NL, positions_NL, parts_NL = torch.stack(
        [torch.cat([row, blank.expand(4, length - row.shape[1])], 1) for row in rows], 1
    )
    seen_NLL = (parts_NL[:, None] == 0) | (parts_NL[:, None] == parts_NL[:, :, None])
    seen_NLL &= torch.ones(length, length, dtype=torch.bool).tril()
    words_NLD = model.get_input_embeddings()(ids_NL)
    hidden_NLD = model.model.language_model(
        inputs_embeds=torch.cat([words_NLD[:, :start], seen_NPD, words_NLD[:, start + IMAGE_TOKENS :]], 1),
        attention_mask=seen_NLL[:, None],
        position_ids=positions_NL,
    ).last_hidden_state
    answers = labels_NL[:, 1:] != -100
    return cross_entropy(model.lm_head(hidden_NLD[:, :-1][answers]), labels_NL[:, 1:][answers])


def train(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, pictures: Pictures, steps: int,
    validation: list[Asked],
) -> None:  # fmt: skip
    """Let all of the model answer questions about pictures, and continue text."""
    text, held_out = (token_stream(processor.tokenizer, name) for name in ("calibration", "heldout"))
    asking, generator = Asking(processor), torch.Generator().manual_seed(1)
    seen_NPD, start = seen(model, pictures), asking.opening.index(processor.image_token_id)
    optimizer = optimizer_of([(model.model.language_model, LANGUAGE_LR)])
    model.train()
    for step in range(steps):
        schedule(optimizer, step, steps)
        naming, turns = step < NAMING_STEPS, step % TURNS_EVERY == TURNS_EVERY - 1
        chosen_N = pictures.choose(2 * BATCH if naming else BATCH)
        ask = pictures.name if naming else pictures.plain if step < PLAIN_STEPS else pictures.ask
        count = NAMING_QUESTIONS if naming else QUESTIONS
        rows = [asking.sequence(ask(i, count), turns) for i in chosen_N.tolist()]
        answers = answers_loss(model, seen_NPD[chosen_N], rows, start)
        first = torch.randint(len(text) - WINDOW, (TEXT_BATCH,), generator=generator)
        windows = text[first[:, None] + torch.arange(WINDOW)]
        windows[:, 0] = processor.tokenizer.bos_token_id
        continued = next_token_loss(model, windows)
        descend(answers + continued, optimizer)
        if step % 50 == 49:
            print(f"step {step + 1}  answers {answers.item():.3f}  text {continued.item():.3f}", flush=True)
        if step % 100 == 99:
            model.eval()
            right = accuracy(model, processor, validation)
            print(f"held out: text {held_out_loss(model, held_out):.3f}, answers {right:.1%}", flush=True)
            model.train()


def save(model: LlavaForConditionalGeneration, out: Path) -> None:
    """Write the weights in bfloat16, and a configuration that says so of each part and names no folder."""
    model.to(torch.bfloat16)
    for part in (model.config.text_config, model.config.vision_config):
        part.dtype, part._name_or_path = torch.bfloat16, ""
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)


def main(source: Path, out: Path, steps: int, tower_steps: int) -> None:
    torch.manual_seed(0)
    start = time.time()
    processor = make_processor()
    model = make_model(processor)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    held_out = token_stream(processor.tokenizer, "heldout")
    before = held_out_loss(model, held_out)
    asked = easy_vqa(source, "train")
    pictures = Pictures(asked[:-VALIDATION])
    processor.save_pretrained(out)  # before any call, of which the tokenizer would keep the padding
    train_tower(model, processor, pictures, tower_steps, each=False)
    train_tower(model, processor, pictures, EACH_STEPS, each=True)
    train(model, processor, pictures, steps, asked[-VALIDATION:])
    seconds = time.time() - start
    save(model, out)
    model, processor = AutoModelForImageTextToText.from_pretrained(out).float(), AutoProcessor.from_pretrained(out)
    record = {
        "test_accuracy": round(accuracy(model, processor, easy_vqa(source, "test")), 4),
        "held_out_accuracy": round(accuracy(model, processor, read_questions(DATA / "pictures" / "heldout.jsonl")), 4),
        "text_loss_before": round(before, 4), "text_loss": round(held_out_loss(model, held_out), 4),
        "unit": "nats a token", "window": WINDOW, "steps": steps, "tower_steps": tower_steps,
        "seconds": round(seconds), "seed": 0, "versions": versions(), "machine": machine(),
    }  # fmt: skip
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(record)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="the folder `easy_vqa` of the package easy-vqa")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--tower-steps", type=int, default=TOWER_STEPS)
    arguments = parser.parse_args()
    main(arguments.source, arguments.out, arguments.steps, arguments.tower_steps)

"""Questions about pictures, from easy-VQA or a bundled file, and how many a model answers."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
MAX_NEW = 8


class Asked(NamedTuple):
    """A picture with what is asked about it."""

    image: Path
    questions: list[tuple[str, str]]
    """(question, answer)."""


def easy_vqa(package: Path, split: str) -> list[Asked]:
    """Read `train` or `test` of easy-VQA from the folder of its package."""
    folder = package / "data" / split
    listed = json.loads((folder / "questions.json").read_text())
    by_image = groupby(sorted(listed, key=lambda line: line[2]), key=lambda line: line[2])
    return [Asked(folder / "images" / f"{i}.png", [(q, a) for q, a, _ in lines]) for i, lines in by_image]


def read_questions(path: Path) -> list[Asked]:
    """Read a bundled file: `{"image": ..., "question": ..., "answer": ...}` a line, paths relative to it."""
    lines = [json.loads(line) for line in path.open(encoding="utf-8")]
    by_image = groupby(lines, key=lambda line: line["image"])
    return [Asked(path.parent / i, [(line["question"], line["answer"]) for line in group]) for i, group in by_image]


def negates(question: str) -> bool:
    return " not " in question or " no " in question


def truths(asked: Asked) -> set[str]:
    """Gather the words that a picture's questions and answers say of it."""
    found = set()
    for question, answer in asked.questions:
        words = {word for word in question.rstrip("?").split() if word in SHAPES + COLOURS}
        if answer not in ("yes", "no"):
            found |= words | {answer}
        elif (answer == "yes") != negates(question):
            found |= words
    return found


class Pictures:
    """Pictures of easy-VQA as tensors, moved about at random: a shape may stand anywhere, and mirrored."""

    WORDS = (SHAPES, COLOURS)

    def __init__(self, asked: list[Asked], seed: int = 0) -> None:
        self.questions = [a.questions for a in asked]
        raw = b"".join(Image.open(a.image).convert("RGB").tobytes() for a in asked)
        self.raw_NHWC = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(len(asked), 64, 64, 3)
        said = [truths(a) for a in asked]
        self.labels = [
            torch.tensor([next((i for i, word in enumerate(words) if word in found), -100) for found in said])
            for words in self.WORDS
        ]
        self.generator = torch.Generator().manual_seed(seed)
        said_yes_or_no = {q for a in asked for q, answer in a.questions if answer in ("yes", "no")}
        self.forms = [sorted({q.replace(w, "{}") for q in said_yes_or_no for w in ws if w in q}) for ws in self.WORDS]

    def choose(self, count: int) -> Tensor:
        return torch.randint(len(self.questions), (count,), generator=self.generator)

    def draw(self, count: int) -> int:
        return int(torch.randint(count, (), generator=self.generator))

    def name(self, picture: int, count: int) -> list[tuple[str, str]]:
        """Draw questions whose answer names a shape or a colour."""
        own = [(q, a) for q, a in self.questions[picture] if a not in ("yes", "no")] or self.questions[picture]
        return [own[self.draw(len(own))] for _ in range(count)]

    def plain(self, picture: int, count: int) -> list[tuple[str, str]]:
        """Draw questions whether a shape or colour is there, without `not`, of our making; one in four names it."""
        found = self.name(picture, count)
        for place in range(count):
            kind = self.draw(2)
            label, words = int(self.labels[kind][picture]), self.WORDS[kind]
            if place % 4 == 0 or label < 0:
                continue
            forms = [form for form in self.forms[kind] if not negates(form)]
            other = label if place % 2 else (label + 1 + self.draw(len(words) - 1)) % len(words)
            found[place] = forms[self.draw(len(forms))].format(words[other]), "yes" if other == label else "no"
        return found

    def ask(self, picture: int, count: int) -> list[tuple[str, str]]:
        """Draw questions about a picture: its own, and as often ones of our making about what it does show.

        Of easy-VQA's questions with yes or no few name what is there, and a model that never looks does well on them.
        """
        own = self.questions[picture]
        found = [own[self.draw(len(own))] for _ in range(count)]
        for place in range(0, count, 2):
            kind = self.draw(2)
            if (label := int(self.labels[kind][picture])) >= 0:
                question = self.forms[kind][self.draw(len(self.forms[kind]))].format(self.WORDS[kind][label])
                found[place] = question, "no" if negates(question) else "yes"
        return found

    def pixels(self, chosen_N: Tensor) -> Tensor:
        """Move the shapes of some pictures; pixels from -1 to 1 as [pictures, colours, height, width]."""
        moved = torch.stack([self.moved(self.raw_NHWC[i]) for i in chosen_N.tolist()])
        return moved.permute(0, 3, 1, 2).float() / 127.5 - 1

    def moved(self, image_HWC: Tensor) -> Tensor:
        """Shift a picture, wrapping around, so that its shape stays whole; mirror every second one."""
        background = image_HWC.view(-1, 3).mode(0).values
        rows, columns = (image_HWC != background).any(-1).nonzero().unbind(1)
        shifts = []
        for place in (rows, columns):
            low, high = -int(place.min()), 63 - int(place.max())
            shifts.append(low + self.draw(high - low + 1))
        image_HWC = image_HWC.roll(shifts, (0, 1))
        return image_HWC.flip(1) if self.draw(2) else image_HWC


def prompt(question: str) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]


@torch.no_grad()
def answer_all(model: PreTrainedModel, processor: ProcessorMixin, asked: list[Asked], batch: int = 64) -> list[str]:
    """Answer every question on its own by greedy decoding, in the order asked."""
    pairs = [(a.image, question) for a in asked for question, _ in a.questions]
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][1]))
    answers = [""] * len(pairs)
    for at in range(0, len(order), batch):
        part = order[at : at + batch]
        texts = [processor.apply_chat_template(prompt(pairs[i][1]), add_generation_prompt=True) for i in part]
        images = [[Image.open(pairs[i][0]).convert("RGB")] for i in part]
        inputs = processor(
            text=texts, images=images, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
        )
        new = model.generate(**inputs, max_new_tokens=MAX_NEW, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        for i, text in zip(part, processor.batch_decode(new, skip_special_tokens=True), strict=True):
            answers[i] = text.strip()
    return answers


def accuracy(model: PreTrainedModel, processor: ProcessorMixin, asked: list[Asked]) -> float:
    """Measure the share of questions whose answer is the expected one, word for word."""
    expected = [answer for a in asked for _, answer in a.questions]
    given = answer_all(model, processor, asked)
    return sum(a == b for a, b in zip(given, expected, strict=True)) / len(expected)

"""The built-in vision-language model: small, stock, as good as recorded, and its pictures with their questions."""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from moesaic.calibration.text import bundled
from moesaic.checkpoint.builtin import shipped_folder
from moesaic.evaluation.perplexity import window_losses

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import vqa_data  # noqa: E402

FOLDER = shipped_folder("tiny-vlm")
PICTURES = FOLDER.parent / "pictures"
RECORD = json.loads((FOLDER / "training.json").read_text())
BUNDLED = ("calibration", "heldout", "photos", "natural")


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(FOLDER, dtype=torch.float32).eval()


def test_it_is_small_and_names_no_folder():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 8e6
    text = "".join(path.read_text() for path in FOLDER.iterdir() if path.suffix in {".json", ".jinja"})
    assert '_name_or_path": "/' not in text
    assert "float32" not in (FOLDER / "config.json").read_text()


@pytest.fixture(scope="module")
def answered(model, processor):
    """(question, expected, given) of the bundled held-out pictures."""
    asked = vqa_data.read_questions(PICTURES / "heldout.jsonl")
    pairs = [pair for a in asked for pair in a.questions]
    given = vqa_data.answer_all(model, processor, asked)
    return [(question, answer, got) for (question, answer), got in zip(pairs, given, strict=True)]


def share_right(answered):
    return sum(answer == got for _, answer, got in answered) / len(answered)


def test_it_answers_as_often_as_recorded(answered):
    found = share_right(answered)
    assert found >= 0.85
    assert found == pytest.approx(RECORD["held_out_accuracy"], abs=0.01)
    assert RECORD["test_accuracy"] == pytest.approx(found, abs=0.03)  # 600 questions of 9,673


def test_it_compares_the_question_with_the_picture(answered):
    """A model that never finds in the picture what a question names, and is right otherwise, has 87 % of all."""
    naming = [row for row in answered if row[1] == ("no" if vqa_data.negates(row[0]) else "yes")]
    assert len(naming) > 50
    assert share_right(naming) >= 0.8


def test_it_looks_at_the_picture(model, processor):
    """The same questions about a blank picture are answered much worse."""
    asked = vqa_data.read_questions(PICTURES / "heldout.jsonl")[:25]
    expected = [answer for a in asked for _, answer in a.questions]
    inputs = [
        processor(
            text=processor.apply_chat_template(vqa_data.prompt(question), add_generation_prompt=True),
            images=[Image.new("RGB", (64, 64), "white")], add_special_tokens=False, return_tensors="pt",
        )
        for a in asked for question, _ in a.questions
    ]  # fmt: skip
    blind = [model.generate(**i, max_new_tokens=6, do_sample=False)[0, i["input_ids"].shape[1] :] for i in inputs]
    texts = [text.strip() for text in processor.batch_decode(blind, skip_special_tokens=True)]
    assert sum(a == b for a, b in zip(texts, expected, strict=True)) / len(expected) < 0.7


def test_it_is_a_language_model_still(model, processor):
    tokens = torch.tensor(
        [i for d in bundled("heldout") for i in processor.tokenizer(d.text, verbose=False)["input_ids"]]
    )
    windows = tokens[: len(tokens) // RECORD["window"] * RECORD["window"]].view(-1, RECORD["window"])[::8]
    loss = torch.stack([window_losses(model, row).mean() for row in windows]).mean().item()
    assert loss == pytest.approx(RECORD["text_loss"], abs=0.1)  # an eighth of the windows
    assert RECORD["text_loss"] < RECORD["text_loss_before"] + 0.1


def test_its_template_takes_parts_strings_and_turns(processor):
    def written(messages, **settings):
        return processor.apply_chat_template(messages, **settings)

    ask, plain = vqa_data.prompt("what is it?"), [{"role": "user", "content": "what is it?"}]
    assert written(ask, add_generation_prompt=True) == "<s>User:<image> what is it?\nAssistant:"
    assert written(plain, add_generation_prompt=True) == "<s>User: what is it?\nAssistant:"
    answer = {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]}
    assert written([*ask, answer]) == "<s>User:<image> what is it?\nAssistant: a cat</s>\n"
    assert written([*ask, {"role": "assistant", "content": "a cat"}]) == written([*ask, answer])
    assert written([*ask, answer, *plain], add_generation_prompt=True) == (
        written([*ask, answer]) + "User: what is it?\nAssistant:"
    )


def test_one_call_makes_its_input(model, processor):
    """The template, tokens and pixels at once, of pictures of any size and mode."""
    image = Image.open(PICTURES / "images" / "traffic-light.png")
    messages = vqa_data.prompt("what color is the shape?")
    messages[0]["content"][0]["image"] = image
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(processor.tokenizer.bos_token_id) == 1
    assert ids.count(model.config.image_token_id) == model.config.image_seq_length
    assert inputs["pixel_values"].shape == (1, 3, 64, 64)
    assert -1 <= inputs["pixel_values"].min() <= inputs["pixel_values"].max() <= 1
    new = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, len(ids) :]
    assert new[-1] == processor.tokenizer.eos_token_id


def test_pixels_are_those_it_was_trained_on(processor):
    """Those of the trainer, without its moves, are the processor's."""
    asked = vqa_data.read_questions(PICTURES / "heldout.jsonl")[:3]
    images = [Image.open(a.image).convert("RGB") for a in asked]
    theirs = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    raw = vqa_data.Pictures(asked).raw_NHWC
    torch.testing.assert_close(theirs, raw.permute(0, 3, 1, 2).float() / 127.5 - 1, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_pictures_are_there_with_questions(name):
    asked = vqa_data.read_questions(PICTURES / f"{name}.jsonl")
    assert len({a.image for a in asked}) == len(asked)  # questions on a picture follow each other
    for a in asked:
        assert all(question and answer for question, answer in a.questions)
        assert max(Image.open(a.image).size) <= 336


def test_no_picture_is_both_calibration_and_held_out():
    shown = {name: {a.image for a in vqa_data.read_questions(PICTURES / f"{name}.jsonl")} for name in BUNDLED}
    assert {name: len(images) for name, images in shown.items()} == {
        "calibration": 200, "heldout": 150, "photos": 16, "natural": 9,
    }  # fmt: skip
    assert set().union(*shown.values()) == set((PICTURES / "images").iterdir())
    assert sum(map(len, shown.values())) == len(list((PICTURES / "images").iterdir()))
    pixels = {name: {path.read_bytes() for path in images} for name, images in shown.items()}
    assert not pixels["calibration"] & pixels["heldout"]


def test_what_a_picture_is_said_to_show_is_read_from_its_questions():
    asked = vqa_data.Asked(
        Path(), [("is there not a red shape?", "no"), ("is a teal shape present?", "no"), ("is there a circle?", "yes")]
    )
    assert vqa_data.truths(asked) == {"red", "circle"}
    assert vqa_data.truths(vqa_data.Asked(Path(), [("what color is the triangle?", "blue")])) == {"triangle", "blue"}

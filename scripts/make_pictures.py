"""Make the bundled pictures with questions: shapes of easy-VQA, photographs in the public domain, drawn pages.

Run once by a maintainer; its output ships in the package:

    pip download --no-deps easy-vqa==1.0 scikit-image==0.26.0, and unzip both
    python scripts/make_pictures.py easyvqa/easy_vqa scikit_image/skimage/data src/moesaic/data/pictures

`calibration.jsonl` and `heldout.jsonl` are from easy-VQA's train and test split, for small models such as `tiny-vlm`;
`photos.jsonl` (to calibrate) and `natural.jsonl` (held out) have larger pictures, for larger models. Their questions
are our own.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path

import drawn_pages
from PIL import Image
from vqa_data import easy_vqa

QUESTIONS = 4
"""Asked about each picture of easy-VQA."""
COUNTS = {"train": 200, "test": 150}
SIDE, QUALITY = 336, 88
SMALLER = {"brick", "gravel", "grass"}
"""Textures: two thirds of each side, at two thirds of the size."""
Photos = dict[str, list[tuple[str, str]]]

CALIBRATION: Photos = {
    "astronaut.png": [
        ("What colour is the astronaut's suit?", "orange"),
        ("What is behind the astronaut on the right?", "a model of a space shuttle"),
        ("Describe the picture.",
         "A portrait of a smiling astronaut in an orange space suit. A flag hangs on the left, a "
         "model of a space shuttle stands on the right, and a white helmet with a black visor is in front."),
    ],
    "brick.png": [
        ("What is the wall made of?", "bricks"),
        ("Describe the picture.",
         "A gray picture of a brick wall: long narrow bricks with light joints, turned so that "
         "they stand upright."),
    ],
    "chelsea.png": [
        ("What animal is this?", "a cat"),
        ("What colour are its eyes?", "green"),
        ("Describe the picture.",
         "A close-up of a tabby cat's face with green eyes and white whiskers. It looks to the "
         "right; the background is blurred."),
    ],
    "coffee.png": [
        ("What is in the cup?", "coffee"),
        ("What colour is the saucer?", "red"),
        ("Describe the picture.",
         "A red cup, white inside and with coffee in it, on a red saucer with a metal spoon. They "
         "are on a wooden table."),
    ],
    "gravel.png": [
        ("What covers the ground?", "gravel"),
        ("Describe the picture.",
         "A gray picture of gravel: many small stones with edges, close together, seen from "
         "above."),
    ],
    "horse.png": [
        ("Which animal's outline is this?", "a horse"),
        ("What colour is the animal?", "black"),
        ("Describe the picture.",
         "A black silhouette of a standing horse on a white background. It is seen from the side "
         "and faces right."),
    ],
    "cell.png": [
        ("On which side of the picture is the bright round cell?", "right"),
        ("Describe the picture.",
         "A gray microscope picture. One bright round cell with a dark rim lies at the right, on "
         "a dark background with faint stripes."),
    ],
    "text.png": [
        ("Is the writing printed or by hand?", "by hand"),
        ("Describe the picture.",
         "Mathematical formulas written by hand on lined paper, seen at a slant and without "
         "colour."),
    ],
}  # fmt: skip
HELD_OUT: Photos = {
    "camera.png": [
        ("What does the man look through?", "a camera"),
        ("What stands under the camera?", "a tripod"),
        ("Describe the picture.",
         "A black and white photograph of a man in a dark coat who bends to look through a camera "
         "on a tripod. He is on a lawn; buildings are far behind it."),
    ],
    "rocket.jpg": [
        ("What stands in the middle of the picture?", "a rocket"),
        ("Is it day or dusk?", "dusk"),
        ("Describe the picture.",
         "A white rocket stands on its launch pad between lattice towers. The sky is dark blue, "
         "and bright lamps shine near the ground."),
    ],
    "grass.png": [
        ("What grows on the ground?", "grass"),
        ("Describe the picture.",
         "A gray picture of grass from above: many thin blades that lie in all directions, and a "
         "few small leaves."),
    ],
    "retina.jpg": [
        ("What shape does the bright part of the picture have?", "a circle"),
        ("Describe the picture.",
         "A photograph of the back of an eye: an orange-red disc on black, with a bright yellow "
         "spot at the left from which blood vessels spread, and a darker spot in the middle."),
    ],
    "clock_motion.png": [
        ("Is the picture sharp or blurred?", "blurred"),
        ("Describe the picture.",
         "A gray photograph of a pale wall clock, taken while the camera moved sideways: it is "
         "blurred into an oval, and no hands can be read."),
    ],
}  # fmt: skip


def write(path: Path, lines: list[tuple[str, str, str]]) -> None:
    """Write (image, question, answer) a line."""
    rows = [dict(zip(("image", "question", "answer"), line, strict=True)) for line in lines]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{path.name}: {len(lines)} questions on {len({image for image, _, _ in lines})} pictures")


def shapes(package: Path, out: Path, split: str) -> list[tuple[str, str, str]]:
    """Copy pictures at even steps through a split, with questions drawn from theirs."""
    asked = [a for a in easy_vqa(package, split) if len(a.questions) >= QUESTIONS]
    generator, lines = random.Random(0), []
    for number in range(COUNTS[split]):
        picture = asked[number * len(asked) // COUNTS[split]]
        name = f"images/{split}-{int(picture.image.stem):05d}.png"
        shutil.copyfile(picture.image, out / name)
        lines += [(name, *pair) for pair in generator.sample(picture.questions, QUESTIONS)]
    return lines


def photographs(folder: Path, out: Path, photos: Photos) -> list[tuple[str, str, str]]:
    """Bring photographs to at most SIDE pixels a side."""
    lines = []
    for file, questions in photos.items():
        image, name = Image.open(folder / file), f"images/{Path(file).stem}.jpg"
        if image.mode == "RGBA":
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("L" if image.mode == "L" else "RGB")
        if Path(file).stem in SMALLER:
            image = image.crop((0, 0, SIDE, SIDE)).resize((SIDE * 2 // 3, SIDE * 2 // 3))
        image.thumbnail((SIDE, SIDE))
        image.save(out / name, quality=QUALITY, optimize=True)
        lines += [(name, *pair) for pair in questions]
    return lines


def pages(out: Path, kinds: tuple) -> list[tuple[str, str, str]]:
    lines = []
    for kind in kinds:
        drawn, name = kind(), f"images/{kind.__name__.replace('_', '-')}.png"
        drawn.image.quantize(64, dither=Image.Dither.NONE).save(out / name, optimize=True)
        lines += [(name, *pair) for pair in drawn.questions]
    return lines


def main(easy: Path, photos: Path, out: Path) -> None:
    (out / "images").mkdir(parents=True, exist_ok=True)
    write(out / "calibration.jsonl", shapes(easy, out, "train"))
    write(out / "heldout.jsonl", shapes(easy, out, "test"))
    write(out / "photos.jsonl", photographs(photos, out, CALIBRATION) + pages(out, drawn_pages.CALIBRATION))
    write(out / "natural.jsonl", photographs(photos, out, HELD_OUT) + pages(out, drawn_pages.HELD_OUT))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))

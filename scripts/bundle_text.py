"""Cut the bundled calibration and held-out text from six labelled domain files.

Run once by a maintainer; its output ships in the package:

    python scripts/bundle_text.py DOMAINS_FOLDER src/moesaic/data

`DOMAINS_FOLDER` holds `<domain>.jsonl`, one `{"text": ..., "meta": ...}` a line. Documents are taken evenly over
each file; every `HELDOUT_EVERY`-th goes to the held-out set, so no document is in both.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

DOMAINS = {
    "c4": "Common Crawl's C4 as selected by its publishers, ODC-BY 1.0",
    "stackexchange": "Stack Exchange contributors, CC BY-SA 2.5, 3.0 or 4.0 by the post's date (LICENSE-DATA.md); "
    "questions and answers at the addresses below",
    "github": "the authors of the files below, each under the licence named beside it (MIT, BSD, Apache or Boost)",
    "book": "public domain in the United States, from Project Gutenberg",
    "wikipedia": "Wikipedia contributors, CC BY-SA 3.0 or 4.0 by the article's date (LICENSE-DATA.md); excerpts from "
    "the articles that open as below",
    "math_tex": "the Stacks project authors, GFDL 1.2 or later without invariant sections and cover texts "
    "(GFDL-1.2.txt)",
}
LICENCES = {"letitvi/VideoGridPlayer: thirdparty/source/asio": "bsl-1.0"}
"""Of files whose own licence is not their repository's, by how their source begins."""
CALIBRATION_BYTES = 170_000
HELDOUT_BYTES = 30_000
HELDOUT_EVERY = 6
MAX_DOCUMENT_CHARS = 8_000
MIN_DOCUMENT_CHARS = 200


def source(domain: str, document: dict) -> str:
    meta = document.get("meta", {})
    if domain == "github":
        file = f"{meta['repo_name']}: {meta['path']}"
        own = next((licence for start, licence in LICENCES.items() if file.startswith(start)), meta["license"])
        return f"{file} ({own})"
    if domain == "book":
        return f"{meta['short_book_title']}, {meta['url']}"
    if domain == "wikipedia":
        return " ".join(document["text"].split()[:8]) + " ..."
    return meta.get("url") or meta.get("source") or "web page"


def choose(documents: list[dict]) -> tuple[list[dict], list[dict]]:
    """(calibration, held-out) documents, spread evenly over the file up to the byte budgets."""
    documents = [d for d in documents if len(d["text"]) >= MIN_DOCUMENT_CHARS]
    held_out = documents[HELDOUT_EVERY - 1 :: HELDOUT_EVERY]
    calibration = [d for i, d in enumerate(documents) if i % HELDOUT_EVERY != HELDOUT_EVERY - 1]
    return evenly(calibration, CALIBRATION_BYTES), evenly(held_out, HELDOUT_BYTES)


def evenly(documents: list[dict], budget: int) -> list[dict]:
    """As many documents, at even steps, as come nearest below `budget` bytes."""
    for count in range(len(documents), 0, -1):
        picked = [documents[i * len(documents) // count] for i in range(count)]
        if sum(len(clip(d).encode()) for d in picked) <= budget:
            return picked
    return [{**documents[0], "text": documents[0]["text"][:budget]}]


def clip(document: dict) -> str:
    return document["text"][:MAX_DOCUMENT_CHARS]


def main(folder: Path, out: Path) -> None:
    sets: dict[str, list[str]] = {"calibration": [], "heldout": []}
    attribution = ["# Where the bundled text and pictures come from\n"]
    for domain, rights in DOMAINS.items():
        documents = [json.loads(line) for line in (folder / f"{domain}.jsonl").open(encoding="utf-8")]
        chosen = choose(documents)
        for name, picked in zip(sets, chosen, strict=True):
            sets[name] += [json.dumps({"domain": domain, "text": clip(d)}, ensure_ascii=False) for d in picked]
        attribution += [f"\n## {domain}\n\nExcerpts, unchanged but cut short: {rights}.\n"]
        sources = sorted({source(domain, d) for picked in chosen for d in picked})
        attribution += [f"- {s}" for s in sources]
    for name, lines in sets.items():
        (out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    path = out / "ATTRIBUTION.md"
    pictures = path.read_text(encoding="utf-8").partition("\n## pictures\n")
    path.write_text("\n".join(attribution) + "\n" + "".join(pictures[1:]), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

"""Let a model answer the bundled prompts: what ships as `answers`, calibration text for models that chat.

Run once by a maintainer; a quarter of an hour on two cores:

    python scripts/write_answers.py demo 12600 src/moesaic/data/answers.jsonl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.console import Console

from moesaic.calibration.prompts import OwnText
from moesaic.checkpoint.sources import resolve
from moesaic.report.progress import progress
from moesaic.serving.own_text import write


def main(model: str, tokens: str, output: str) -> None:
    with progress(Console(stderr=True), "writing", "token") as tick:
        documents = write(OwnText(None, None), resolve(model), int(tokens), progress=tick)
    with Path(output).open("w", encoding="utf-8") as file:
        for one in documents:
            said = [{"role": turn.role, "content": turn.content} for turn in one.messages]
            row = {"domain": one.domain} | ({"messages": said} if said else {"text": one.text})
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])

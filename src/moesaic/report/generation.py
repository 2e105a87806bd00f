"""What a model wrote and how it was judged, for people."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console

from ..results import GenerationScore
from .grid import grid, say

SCORES = {"pass_at_1": "pass@1", "exact_match": "exact match"}


def show_generation(console: Console, scores: Mapping[str, GenerationScore]) -> None:
    """Show a row for each score and each agreement; nothing of none."""
    if not scores:
        return
    table = grid("Generation, greedy", "exercises", "measure", "value", "\N{PLUS-MINUS SIGN} stderr", "n")
    for name, score in scores.items():
        rows = [(SCORES[key], value, score.stderr) for key in SCORES if (value := getattr(score, key)) is not None]
        rows += [
            (label, value, error)
            for label, value, error in (
                ("agreement", score.agreement, score.agreement_stderr),
                ("loss, nats", score.loss, None),
                ("common tokens", score.common_prefix, None),
            )
            if value is not None
        ]
        for number, (label, value, error) in enumerate(rows):
            first = number == 0
            table.add_row(
                name * first, label, f"{value:.3f}", "-" if error is None else f"{error:.3f}", f"{score.n:,}" * first
            )
    console.print(table)
    for name, score in scores.items():
        how = "asked by the chat template" if score.chat else "continued as it stands"
        limit = f"; {score.ended:.0%} ended within {score.max_new_tokens:,} tokens" if score.ended is not None else ""
        theirs = f"; the reference wrote {score.reference_tokens:,} tokens" if score.reference_tokens else ""
        say(console, f"{name}: {how}{limit}{theirs}; sha256 {score.data_sha256[:12]}, {score.seconds:.0f} s", "dim")

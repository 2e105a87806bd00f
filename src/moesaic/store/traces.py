"""Route traces: which experts each token of some requests used, read and written as CSV.

Ours has a line for each token in each layer, in the order in which they ran, below two lines of comment:

    # moesaic route trace 1
    # {"model": "tiny-moe", "num_layers": 4, "num_experts": 16, "expert_bytes": 73728}
    request,step,phase,token,layer,experts,weights
    0,0,prefill,0,0,3;14;5;9,0.41;0.22;0.2;0.17

`step` counts the forward passes of a request: 0 is its whole prompt, each later one a token. `layer` counts those that
have experts. BigMoeOnEdge's `--route-trace` (github.com/Helldez/BigMoeOnEdge, docs/telemetry.md) has a line for each
expert, `turn,phase,step,layer,slot,expert,weight,...`, and is read too.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

from ..errors import InputError
from ..files import to_json, write_whole
from ..given import path as as_path
from .routes import DECODE, PREFILL, Route, RouteTrace

FIRST_LINE = "# moesaic route trace 1"
COLUMNS = ("request", "step", "phase", "token", "layer", "experts", "weights")
OTHERS = ("turn", "phase", "step", "layer", "slot", "expert", "weight")
"""BigMoeOnEdge's; columns after them are optional."""
PHASES = {"0": PREFILL, "1": DECODE, PREFILL: PREFILL, DECODE: DECODE}
MAGIC = b"\x1f\x8b"
AGAIN = "write one with: moesaic inspect MODEL --trace FILE"
MOST = 1_000_000
"""More layers or experts no model has: a number beyond is a damaged one."""


def is_trace(path: Path) -> bool:
    """Tell whether a file is a trace that `write_trace` made, whole or not."""
    try:
        with _opened(path) as lines:
            return next(lines, "").startswith(FIRST_LINE)
    except (OSError, EOFError, ValueError, zlib.error):
        return False


def write_trace(path: Path, trace: RouteTrace) -> None:
    """Write a trace, whole or not at all; compressed if the name ends in `.gz`.

    Raises:
        StorageError: it cannot be written.
    """
    about = {"model": trace.model, "num_layers": trace.num_layers, "num_experts": trace.num_experts}
    if trace.expert_bytes is not None:
        about["expert_bytes"] = trace.expert_bytes
    lines = [FIRST_LINE, f"# {to_json(about)}", ",".join(COLUMNS)]
    for r in trace.routes:
        experts, weights = ";".join(map(str, r.experts)), ";".join(f"{w:.4g}" for w in r.weights)
        lines.append(f"{r.request},{r.step},{r.phase},{r.token},{r.layer},{experts},{weights}")
    content = ("\n".join(lines) + "\n").encode()
    if path.suffix == ".gz":
        content = gzip.compress(content, mtime=0)
    write_whole(path, lambda partial: partial.write_bytes(content))


def read_trace(file: str | Path) -> RouteTrace:
    """Read a trace, ours or BigMoeOnEdge's, compressed or not.

    Raises:
        InputError: there is no such file, or a line of it is damaged; the message has its number.
    """
    path = as_path(file)
    try:
        with _opened(path) as lines:
            return _Reader(path).read(lines)
    except (OSError, EOFError, zlib.error) as error:  # what is cut off within a .gz is EOFError
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"'{path}' cannot be read as a route trace ({reason}); {AGAIN}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"'{path}' is no text, so no route trace; {AGAIN}") from error


class _opened:
    """A text file's lines, decompressed if it is compressed, whatever its name."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            packed = file.read(2) == MAGIC
        self.file = gzip.open(path, "rt", encoding="utf-8") if packed else path.open(encoding="utf-8")  # noqa: SIM115

    def __enter__(self) -> Iterator[str]:
        return iter(self.file)

    def __exit__(self, *error: object) -> None:
        self.file.close()


class _Reader:
    """Reads the lines of one trace."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.number = 0
        self.about: dict[str, object] = {}

    def read(self, lines: Iterator[str]) -> RouteTrace:
        rows: list[Route] = []
        read: Callable[[list[str]], Route] | None = None
        ended = True
        for self.number, line in enumerate(lines, 1):
            ended = line.endswith("\n")
            cells = line.strip().split(",")
            if line.startswith("#"):
                self.comment(line[1:].strip())
            elif read is None:
                read = self.reader(cells)
            elif line.strip():
                rows.append(read(cells))
        if not rows:
            raise InputError(f"'{self.path}' has no routes; {AGAIN}")
        if not ended:
            raise self.bad("it ends in the middle")
        return self.joined(rows) if read == self.one_expert else self.checked(rows)

    def bad(self, what: str) -> InputError:
        return InputError(f"'{self.path}', line {self.number}: {what}; {AGAIN}, or copy it again")

    def comment(self, text: str) -> None:
        """Read what a line of comment says of the model, ours as JSON, BigMoeOnEdge's as `name=value`."""
        if text.startswith("{"):
            try:
                self.about |= json.loads(text)
            except (ValueError, RecursionError):
                raise self.bad("the description of the model is no JSON object") from None
        said = dict(word.split("=", 1) for word in text.split() if "=" in word)
        if "n_expert" in said:
            self.about |= {"num_experts": self.whole(said["n_expert"], "n_expert"), "model": said.get("arch", "")}
        if "expert_bytes" in said:
            self.about["expert_bytes"] = self.whole(said["expert_bytes"], "expert_bytes", most=2**50)

    def reader(self, cells: list[str]) -> Callable[[list[str]], Route]:
        """Choose by the header how lines are read."""
        if tuple(cells) == COLUMNS:
            return self.one_token
        if tuple(cells[: len(OTHERS)]) == OTHERS:
            self.dropped = cells.index("dropped") if "dropped" in cells else None
            self.width = len(cells)
            return self.one_expert
        raise self.bad(f"expected the header {','.join(COLUMNS)}, or BigMoeOnEdge's {','.join(OTHERS)},...")

    def whole(self, text: str, name: str, most: int = MOST) -> int:
        if not (text.isascii() and text.isdigit()) or len(text) > 18 or int(text) > most:
            raise self.bad(f"{name} is '{text[:40]}', expected a whole number")
        return int(text)

    def wholes(self, **cells: str) -> list[int]:
        return [self.whole(text, name) for name, text in cells.items()]

    def decimal(self, text: str) -> float:
        try:
            return float(text)
        except ValueError:
            raise self.bad(f"a weight is '{text[:40]}', expected a number") from None

    def phase(self, text: str) -> str:
        if text not in PHASES:
            raise self.bad(f"phase is '{text[:40]}', expected {PREFILL} or {DECODE}")
        return PHASES[text]

    def one_token(self, cells: list[str]) -> Route:
        if len(cells) != len(COLUMNS):
            raise self.bad(f"{len(cells)} columns, expected {len(COLUMNS)}")
        request, step, phase, token, layer, experts, weights = cells
        numbers = self.wholes(request=request, step=step, token=token, layer=layer)
        chosen = tuple(self.whole(part, "an expert") for part in experts.split(";")) if experts else ()
        weighed = tuple(self.decimal(part) for part in weights.split(";")) if weights else ()
        if len(set(chosen)) < len(chosen) or len(weighed) != len(chosen):
            raise self.bad(f"experts {experts[:40]} with weights {weights[:40]}: each expert once, with one weight")
        return Route(numbers[0], numbers[1], self.phase(phase), numbers[2], numbers[3], chosen, weighed)

    def one_expert(self, cells: list[str]) -> Route:
        """Read a line of one expert; until tokens are joined, `step` is its slot."""
        if len(cells) != self.width:
            raise self.bad(f"{len(cells)} columns, expected {self.width}")
        turn, phase, token, layer, slot, expert, weight = cells[: len(OTHERS)]
        numbers = self.wholes(turn=turn, slot=slot, step=token, layer=layer)
        ran = self.dropped is None or cells[self.dropped] != "1"
        chosen, weighed = ((self.whole(expert, "expert"),), (self.decimal(weight),)) if ran else ((), ())
        return Route(numbers[0], numbers[1], self.phase(phase), numbers[2], numbers[3], chosen, weighed)

    def joined(self, rows: list[Route]) -> RouteTrace:
        """Join the experts of a token, number forward passes, and count layers that have experts only."""
        layers = {layer: number for number, layer in enumerate(sorted({row.layer for row in rows}))}
        experts: dict[tuple[int, bool, int, int], list[Route]] = {}
        for row in rows:
            experts.setdefault((row.request, row.phase == DECODE, row.token, row.layer), []).append(row)
        routes, steps = [], {}
        for (request, decode, token, layer), unsorted in sorted(experts.items()):
            parts = sorted(unsorted, key=lambda row: row.step)
            number = steps.setdefault(request, {}).setdefault(token if decode else -1, len(steps[request]))
            chosen = tuple(e for part in parts for e in part.experts)
            weights = tuple(w for part in parts for w in part.weights)
            if len(set(chosen)) < len(chosen):
                raise InputError(
                    f"'{self.path}': turn {request}, step {token}, layer {layer} has an expert twice; {AGAIN}"
                )
            routes.append(Route(request, number, parts[0].phase, token, layers[layer], chosen, weights))
        return self.checked(sorted(routes, key=lambda r: (r.request, r.step, r.layer, r.token)))

    def checked(self, rows: list[Route]) -> RouteTrace:
        """Check that rows are in order, and that they fit what the file says of the model."""
        order = [(row.request, row.step, row.layer, row.token) for row in rows]
        if any(b <= a for a, b in pairwise(order)):
            raise InputError(
                f"'{self.path}': lines are not in the order of request, step, layer and token, or one is there twice; "
                f"{AGAIN}"
            )
        used = {"num_layers": max(r.layer for r in rows), "num_experts": max(max(r.experts, default=0) for r in rows)}
        for name, most in used.items():
            said = self.about.get(name, most + 1)
            if not isinstance(said, int) or not most < said <= MOST:
                raise InputError(f"'{self.path}': {name} is {said}, but number {most} is used; {AGAIN}")
            used[name] = said
        size, model = self.about.get("expert_bytes"), self.about.get("model")
        return RouteTrace(
            routes=rows, num_layers=used["num_layers"], num_experts=used["num_experts"],
            model=model if isinstance(model, str) else "", expert_bytes=size if isinstance(size, int) else None,
        )  # fmt: skip

"""The frontier: methods x budgets x memory on one model, each converted and measured the same way, resumable."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from ..config import ConvertConfig
from ..conversion.auto import candidates
from ..conversion.convert import convert
from ..errors import InputError
from ..evaluation.evaluate import check_request, evaluate
from ..formats.loading import load
from ..machine import machine, versions
from ..plan import check_share, nearest_plan, parse_plan
from .bounds import top_neurons
from .recipes import ALL, METHODS, NEURONS, ORACLE, chosen, may_overlap
from .speed import shape_speed

RESULT = "frontier.json"


@dataclass(frozen=True)
class Measurement:
    """How every row of a frontier is measured; rows of another measurement are not mixed with these."""

    text: str | None = None
    max_tokens: int | None = None
    tasks: str | None = None
    items: int | None = None
    """Of each task, at most so many."""
    calibration: tuple[str, ...] = ()
    tokens: int = 16_384
    speed: bool = True

    def setting(self) -> dict[str, Any]:
        """What decides the numbers, wherever the files lie: names and SHA-256 in place of paths."""
        return {
            "text": _named(self.text), "max_tokens": self.max_tokens, "tasks": _named(self.tasks), "items": self.items,
            "calibration": [_named(source) for source in self.calibration], "tokens": self.tokens,
        }  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One conversion of the frontier."""

    method: str
    active: float
    memory_factor: float
    seed: int

    def config(self, measurement: Measurement) -> ConvertConfig:
        """The conversion that it stands for."""
        method = METHODS[self.method]
        plan = str(nearest_plan(self.active, method.groups, method.groups)) if method.groups else None
        return ConvertConfig(
            active=None if plan else self.active, plan=plan, memory_factor=self.memory_factor, seed=self.seed,
            partition=method.partition, recovery=method.recovery, router=method.router,
            calibration=measurement.calibration, tokens=measurement.tokens, fine=method.fine,
        )  # fmt: skip


def frontier(
    model: str,
    output: Path,
    *,
    active: Sequence[float] = (0.25, 0.5, 0.75),
    memory_factors: Sequence[float] = (1.0,),
    methods: Sequence[str] = ("default", "static+closed-form", "flap", "cmoe"),
    seeds: Sequence[int] = (0,),
    measurement: Measurement | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Convert and measure `model` with every method at every budget; rows are kept in `output/frontier.json`.

    Finished rows are not measured again. A row has `method, ffn_active, memory_factor, plan, seed, perplexity,
    perplexity_ratio, speedup, tasks_mean`; the bounds (`neurons`, routing by an oracle) have no speed-up. Memory
    factors other than 1 are measured for methods whose experts may overlap. Each conversion is deleted when it is
    measured. Decode speed is measured last, once for each shape of all rows on this machine; `speeds` has the details.

    Returns:
        What `frontier.json` holds; `frontier.png` and `frontier.svg` beside it show it.

    Raises:
        InputError: an unknown method, a shape that does not fit (with `methods=["all"]`: no shape that does; `unfit`
            says why), or bad files; before anything is converted.
    """
    measurement = measurement or Measurement()
    check_request(path(measurement.text), "gptq", 2_048, measurement.max_tokens, path(measurement.tasks), None)
    points, unfit = _points(model, active, memory_factors, methods, seeds, measurement)
    result = _resume(model, output, measurement) | {"unfit": unfit}
    rows: list[dict[str, Any]] = result["rows"]
    report = progress or (lambda count, all, note: None)
    if "dense" not in result:
        report(0, len(points), "dense")
        result["dense"] = _evaluate(model, measurement)
        _save(result, output)
    for number, point in enumerate(points):
        if _key(asdict(point)) not in map(_key, rows):
            report(number, len(points), f"{point.method}, {point.active:.0%} active")
            rows.append(_measure(model, point, measurement, result["dense"]["perplexity"], output))
            _save(result, output)
    if measurement.speed:
        _measure_speeds(model, result, output, lambda shape: report(len(points), len(points), f"speed of {shape}"))
    _take_speeds(rows, result.get("speeds", []), measurement)
    report(len(points), len(points), "done")
    result["summary"] = summarise(rows)
    _save(result, output)
    from ..report.plots import write_frontier  # matplotlib is slow to import

    write_frontier(result["summary"], model, output)
    return result


def path(name: str | None) -> Path | None:
    """A path, or None for none."""
    return None if name is None else Path(name)


def _named(source: str | None) -> str | None:
    """A file's name and SHA-256; what is no file (a dataset) by its name alone."""
    if source is None or not Path(source).is_file():
        return source
    return f"{Path(source).name} sha256:{hashlib.sha256(Path(source).read_bytes()).hexdigest()[:16]}"


def _points(
    model: str,
    active: Sequence[float],
    memory_factors: Sequence[float],
    methods: Sequence[str],
    seeds: Sequence[int],
    measurement: Measurement,
) -> tuple[list[Point], dict[str, str]]:
    """The conversions to make, checked, and why methods of `all` do not fit."""
    for share in active:
        check_share(share)
    points: list[Point] = []
    unfit: dict[str, str] = {}
    for seed, share, name in product(seeds, active, chosen(methods)):
        for factor in memory_factors if may_overlap(name) else (1.0,):
            point = Point(name, share, factor, seed)
            try:
                if name != NEURONS:
                    candidates(model, point.config(measurement))
            except InputError as error:
                if ALL not in methods:
                    raise
                unfit[f"{name}, {share:.0%} active"] = str(error)
            else:
                points.append(point)
    if unfit and all(point.method == NEURONS for point in points):
        raise InputError(next(iter(unfit.values())))
    return points, unfit


def _shape(row: dict[str, Any]) -> tuple[str, int] | None:
    """What decides a conversion's speed, whatever its method; None for a bound."""
    bound = row["plan"] is None or METHODS[row["method"]].router == ORACLE
    return None if bound else (row["plan"], row["expert_width"])


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("method", "active", "memory_factor", "seed"))


def _resume(model: str, output: Path, measurement: Measurement) -> dict[str, Any]:
    """The rows found in `output` if they were measured in the same way, else a fresh result."""
    setting = {"model": model} | measurement.setting()
    file = output / RESULT
    if output.exists() and not output.is_dir():
        raise InputError(f"'{output}' is a file; choose another folder with --out")
    if not file.is_file():
        return {"setting": setting, "versions": versions(), "machine": machine(), "rows": []}
    try:
        found = json.loads(file.read_text())
        found["setting"], found["rows"]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"'{file}' is no frontier's ({error!r}); choose another --out, or delete it") from error
    changed = [name for name, value in setting.items() if found["setting"].get(name) != value]
    if changed:
        raise InputError(
            f"'{file}' was measured with another {', '.join(changed)}; choose another --out, or delete it to start anew"
        )
    return found


def _save(result: dict[str, Any], output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    partial = output / f"{RESULT}.writing"
    partial.write_text(json.dumps(result, indent=2) + "\n")
    partial.replace(output / RESULT)


def _evaluate(model: str | Path, measurement: Measurement, keep: float | None = None) -> dict[str, Any]:
    """Perplexity and tasks of a model, or of the bound that keeps a share of its neurons."""
    loaded, tokenizer = load(model, for_scoring=True)
    options: Any = {
        "text": path(measurement.text), "max_tokens": measurement.max_tokens, "tasks": path(measurement.tasks),
        "items": measurement.items,
    }  # fmt: skip
    if keep is None:
        return evaluate(loaded, tokenizer, **options)
    with top_neurons(loaded, keep):
        return evaluate(loaded, tokenizer, **options)


def _measure(model: str, point: Point, measurement: Measurement, dense: float, output: Path) -> dict[str, Any]:
    """A point's row; `dense` is the dense model's perplexity.

    Each conversion has its own folder, so that one that was stopped waits for its turn.
    """
    row: dict[str, Any] = asdict(point) | {"machine": machine(), "versions": versions(), "speedup": None}
    if point.method == NEURONS:
        found = _evaluate(model, measurement, keep=point.active)
        row |= {"plan": None, "ffn_active": point.active}
    else:
        work = output / "-".join(["work", *map(str, asdict(point).values())])
        metrics = convert(model, work, point.config(measurement), overwrite=True, force=True)
        names = ("plan", "expert_width", "ffn_active", "seconds", "peak_rss_bytes", "partition", "fingerprint")
        row |= {name: metrics[name] for name in names} | {"memory": metrics["memory_factor"]}
        found = _evaluate(work, measurement)
        shutil.rmtree(work)
    row |= {"perplexity": found["perplexity"], "perplexity_ratio": found["perplexity"] / dense, "dtype": found["dtype"]}
    if found["tasks"]:
        mean = found["tasks"]["mean"]
        row |= {"tasks": found["tasks"], "tasks_mean": mean["acc"], "tasks_stderr": mean["stderr"]}
    return row


def _measure_speeds(model: str, result: dict[str, Any], output: Path, report: Callable[[str], None]) -> None:
    """Add the decode speed of every row's shape on this machine to `speeds`, where it is not there yet."""
    speeds: list[dict[str, Any]] = result.setdefault("speeds", [])
    here = machine()
    wanted = dict.fromkeys(shape for row in result["rows"] if (shape := _shape(row)))
    known = {(s["plan"], s["expert_width"]) for s in speeds if s["machine"] == here}
    if missing := [shape for shape in wanted if shape not in known]:
        dense, tokenizer = load(model)
        for text, width in missing:
            report(text)
            plan = parse_plan(text, dense.config.intermediate_size, width, overlapping=True)
            found = shape_speed(dense, tokenizer, plan)
            speeds.append({"plan": text, "expert_width": width, "machine": here} | found)
            _save(result, output)


def _take_speeds(rows: list[dict[str, Any]], speeds: list[dict[str, Any]], measurement: Measurement) -> None:
    """Give every row its shape's decode speed: of this machine if it was to be measured, else of the last one."""
    where = machine() if measurement.speed or not speeds else speeds[-1]["machine"]
    known: dict[Any, float] = {(s["plan"], s["expert_width"]): s["speedup"] for s in speeds if s["machine"] == where}
    for row in rows:
        row["speedup"] = known.get(_shape(row))


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that differ by seed only as one: means, `perplexity_ratio_deviation` (of the sample) and `seeds`.

    `default` may take another cut with another seed, which makes another line.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((*_key(row)[:3], row.get("partition"), row["plan"]), []).append(row)
    summary = []
    for same in groups.values():
        ratios = [row["perplexity_ratio"] for row in same]
        mean = sum(ratios) / len(ratios)
        deviation = math.sqrt(sum((r - mean) ** 2 for r in ratios) / max(1, len(ratios) - 1))
        names = ("method", "active", "ffn_active", "memory_factor", "memory", "plan", "partition", "speedup")
        row = {name: same[0].get(name) for name in names}
        row |= {"perplexity_ratio": mean, "perplexity_ratio_deviation": deviation, "seeds": len(same)}
        if "tasks_mean" in same[0]:
            row["tasks_mean"] = sum(r["tasks_mean"] for r in same) / len(same)
            row["tasks_stderr"] = same[0]["tasks_stderr"]
        summary.append(row)
    return summary

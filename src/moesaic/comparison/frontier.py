"""The frontier: methods x budgets x memory on one model, each converted and measured the same way, resumable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from itertools import product, zip_longest
from pathlib import Path

from ..checkpoint.builtin import known_as
from ..checkpoint.claim import claim, remove
from ..checkpoint.reader import Checkpoint
from ..checkpoint.sources import resolve
from ..conversion.auto import candidates, unwritten
from ..conversion.convert import convert
from ..errors import InputError
from ..evaluation.evaluate import check_request, evaluate, task_processor
from ..files import write_json
from ..given import check, optional_path, path, place
from ..machine import machine, versions
from ..models.families import settle_width
from ..plan import parse_plan
from ..progress import Progress, unheard
from ..report.frontier_page import write_frontier_page
from ..report.frontier_plot import write_frontier
from ..report.frontier_tasks import write_tasks
from ..results import EvaluationResult, FrontierResult, FrontierRow
from ..serving.loading import load
from .baselines import Request, UndefinedBudget, build
from .baselines.base import Alter
from .recipes import ALL, BASELINES, chosen, may_overlap
from .rows import WINDOW, Measurement, Point, Shape, read_frontier, shape_of
from .siblings import Dense, add_sibling, check_siblings, place_rows
from .speed import depth_speed, is_depth, shape_speed, sibling_speed

RESULT = "frontier.json"
WEIGHTS = "weights_fingerprint"
"""The setting that tells models of one name apart; results of older versions have none."""


def frontier(
    model: str,
    output: str | Path,
    *,
    active: Sequence[float] = (0.25, 0.5, 0.75),
    memory_factors: Sequence[float] = (1.0,),
    methods: Sequence[str] = ("default", "static+closed-form", "flap", "cmoe"),
    seeds: Sequence[int] = (0,),
    siblings: Sequence[str] = (),
    measurement: Measurement | None = None,
    html: bool = False,
    progress: Progress | None = None,
) -> FrontierResult:
    """Convert and measure `model` with every method at every budget; rows are kept in `output/frontier.json`.

    Finished rows are not measured again; the bounds (`neurons`, routing by an oracle) have no speed-up. Memory
    factors other than 1 are measured for methods whose experts may overlap. Each conversion is deleted when it is
    measured. Decode speed is measured last, once for each shape of all rows on this machine. `frontier.png` and `.svg`
    beside the file show the main lines, `frontier_tasks.png` their accuracy where there are tasks, and with `html` the
    interactive `frontier.html` shows all.

    Smaller dense siblings are measured in the same way, and their line (`line_at`) is what a conversion must beat at
    equal speed: `over_line` of each row is its perplexity over the line's, and `verdict` says who wins.

    Args:
        model: hub id, folder, .gguf file or built-in name.
        output: the folder for rows and charts.
        active: ffn shares, above 0 and at most 1.
        memory_factors: sizes of all experts relative to the dense FFN.
        methods: names of `comparison/recipes.py`, or `all` that fit.
        seeds: each makes a row of its own.
        siblings: smaller dense models of the same family, named as `model` is.
        measurement: how rows are measured; None is as the fields of `Measurement` say.
        html: whether `frontier.html` is written too.
        progress: called with (finished, all, what comes next).

    Raises:
        InputError: an unknown method, a shape that does not fit (with `methods=["all"]`: no shape that does; `unfit`
            says why), a sibling that is no smaller or not dense, or bad files; before anything is converted.
    """
    measurement, output, model = measurement or Measurement(), path(output), place(model)
    check_request(
        optional_path(measurement.text), "gptq", WINDOW, measurement.max_tokens, optional_path(measurement.tasks), None
    )
    task_processor(model, optional_path(measurement.tasks))
    family = check_siblings(model, siblings, measurement)
    points, unfit = _points(model, active, memory_factors, methods, seeds, measurement)
    result = replace(_resume(model, output, measurement), unfit=unfit)
    with claim(output, working=False):  # another one would write over our rows
        result = _fill(result, model, points, family, measurement, output, progress or unheard)
    write_frontier(result.summary, known_as(model), output, result.siblings)
    write_tasks(result, known_as(model), output)
    if html:
        write_frontier_page(result, output / "frontier.html", known_as(model))
    return result


def _fill(
    result: FrontierResult,
    model: str,
    points: Sequence[Point],
    family: Sequence[Dense],
    measurement: Measurement,
    output: Path,
    report: Progress,
) -> FrontierResult:
    """Measure what is not measured yet, each row stored when it is there."""
    if result.dense is None:
        report(0, len(points), "dense")
        result = _save(replace(result, dense=_evaluate(model, measurement)), output)
    for sibling in family:
        if not {sibling.fingerprint, sibling.former_fingerprint} & {found.fingerprint for found in result.siblings}:
            report(0, len(points), f"sibling {sibling.name}")
            own = _evaluate(sibling.folder, measurement)
            result = _save(add_sibling(result, model, sibling, own, measurement), output)
    assert result.dense is not None
    dense = result.dense.perplexity
    for number, point in enumerate(points):
        if point not in {Point.of(row) for row in result.rows}:
            report(number, len(points), f"{point.method}, {point.active:.0%} active")
            row = _measure(model, point, measurement, dense, output)
            result = _save(replace(result, rows=[*result.rows, row]), output)
    if measurement.speed:
        said = partial(report, len(points), len(points))
        result = _measure_speeds(model, result, output, lambda shape: said(f"speed of {shape}"))
    report(len(points), len(points), "done")
    return _save(place_rows(_take_speeds(result, measurement), model), output)


def _points(
    model: str,
    active: Sequence[float],
    memory_factors: Sequence[float],
    methods: Sequence[str],
    seeds: Sequence[int],
    measurement: Measurement,
) -> tuple[list[Point], dict[str, str]]:
    """List the conversions to make, checked, and why methods of `all` do not fit."""
    for name, given in {"active": active, "memory_factors": memory_factors, "methods": methods, "seeds": seeds}.items():
        if not given:
            raise InputError(f"--{name.replace('_', '-').removesuffix('s')} is empty; give one at least")
    for share, factor, seed in zip_longest(active, memory_factors, seeds):
        check(active=share, memory_factor=factor, seed=seed)
    points: list[Point] = []
    unfit: dict[str, str] = {}
    for seed, share, name in product(seeds, active, chosen(methods)):
        for factor in memory_factors if may_overlap(name) else (1.0,):
            point = Point(name, share, factor, seed)
            try:
                if name in BASELINES:
                    build(name).check(model, point, measurement)
                else:
                    candidates(model, unwritten(point.config(measurement)))
            except InputError as error:
                if ALL not in methods and not isinstance(error, UndefinedBudget):
                    raise
                unfit[f"{name}, {share:.0%} active"] = str(error)
            else:
                points.append(point)
    real = [point for point in points if point.method not in BASELINES or build(point.method).calibrated]
    if not points or (ALL in methods and not real):
        raise InputError(next(iter(unfit.values())))
    return points, unfit


def _resume(model: str, output: Path, measurement: Measurement) -> FrontierResult:
    """Read the rows found in `output` if they were measured in the same way, else make a fresh result."""
    setting = {"model": model} | measurement.setting()
    file = output / RESULT
    if output.exists() and not output.is_dir():
        raise InputError(f"'{output}' is a file; choose another folder with --out")
    if not file.is_file():
        setting |= {WEIGHTS: Checkpoint(resolve(model)).weights_fingerprint()}
        return FrontierResult(
            setting=setting, versions=versions(), machine=machine(), rows=[], unfit={}, speeds=[], summary=[]
        )
    try:
        found = read_frontier(file)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"'{file}' is no frontier's ({error}); choose another --out, or delete it") from error
    changed = [name for name, value in setting.items() if found.setting.get(name) != value]
    if changed:
        raise InputError(
            f"'{file}' was measured with another {', '.join(changed)}; choose another --out, or delete it to start anew"
        )
    own = Checkpoint(resolve(model)).weights_fingerprint()
    if found.setting.get(WEIGHTS, own) != own:
        raise InputError(
            f"'{file}' was measured on other weights, which were called '{model}' too; choose another --out, or delete "
            "it to start anew"
        )
    return replace(found, setting=found.setting | {WEIGHTS: own})


def _save(result: FrontierResult, output: Path) -> FrontierResult:
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / RESULT, result.to_dict())
    return result


def _evaluate(model: str | Path, measurement: Measurement, alter: Alter | None = None) -> EvaluationResult:
    """Measure perplexity and tasks of a model, or of what `alter` makes of it when it is loaded."""
    tasks = optional_path(measurement.tasks)
    processor = task_processor(model, tasks)
    loaded, tokenizer = load(model)
    with nullcontext() if alter is None else alter(loaded):
        return evaluate(
            loaded, processor or tokenizer, text=optional_path(measurement.text), max_tokens=measurement.max_tokens,
            tasks=tasks, items=measurement.items,
        )  # fmt: skip


def _measure(model: str, point: Point, measurement: Measurement, dense: float, output: Path) -> FrontierRow:
    """Measure a point; `dense` is the dense model's perplexity.

    Each conversion has its own folder, so that one that was stopped waits for its turn.
    """
    work, metrics, cost = output / "-".join(["work", *map(str, asdict(point).values())]), None, None
    if point.method in BASELINES:
        request = Request(model, point, measurement, work)
        made = build(point.method).measure(request, lambda model, alter=None: _evaluate(model, measurement, alter))
        found, cost = made.found, made.cost
    else:
        metrics = convert(model, work, point.config(measurement), overwrite=True, force=True)
        found = _evaluate(work, measurement)
        remove(work)
    mean = found.tasks.get("mean")
    row = FrontierRow(
        **asdict(point), plan=None, ffn_active=point.active, machine=machine(), versions=versions(), dtype=found.dtype,
        perplexity=found.perplexity, perplexity_ratio=found.perplexity / dense, tasks=found.tasks or None,
        tasks_mean=mean.acc if mean else None, tasks_stderr=mean.stderr if mean else None,
    )  # fmt: skip
    if cost is not None:
        return cost.on(row)
    assert metrics is not None
    return replace(
        row, plan=metrics.plan, expert_width=metrics.expert_width, ffn_active=metrics.ffn_active,
        seconds=metrics.seconds, peak_rss_bytes=metrics.peak_rss_bytes, partition=metrics.partition,
        fingerprint=metrics.fingerprint, memory=metrics.memory_factor,
    )  # fmt: skip


def _measure_speeds(model: str, result: FrontierResult, output: Path, report: Callable[[str], None]) -> FrontierResult:
    """Add the decode speed of every row's shape on this machine to `speeds`, where it is not there yet."""
    here = machine()
    wanted = dict.fromkeys(shape for row in result.rows if (shape := shape_of(row)))
    known = {Shape(s.plan, s.expert_width) for s in result.speeds if s.machine == here}
    missing = [shape for shape in wanted if shape not in known]
    timed = {speed.fingerprint for speed in result.sibling_speeds if speed.machine == here}
    siblings = [sibling for sibling in result.siblings if sibling.fingerprint not in timed]
    if not missing and not siblings:
        return result
    dense, tokenizer = load(model)
    for sibling in siblings:
        report(sibling.label)
        smaller = load(sibling.model, dtype=dense.dtype).model
        timing = replace(sibling_speed(smaller, dense, tokenizer, sibling.fingerprint), machine=here)
        result = _save(replace(result, sibling_speeds=[*result.sibling_speeds, timing]), output)
    for shape in missing:
        report(shape.plan)
        if is_depth(shape):
            found = replace(depth_speed(dense, tokenizer, shape), machine=here)
        else:
            width = settle_width(dense)
            plan = parse_plan(shape.plan, width, shape.expert_width, overlapping=True)
            found = replace(shape_speed(dense, tokenizer, plan), machine=here)
        result = _save(replace(result, speeds=[*result.speeds, found]), output)
    return result


def _take_speeds(result: FrontierResult, measurement: Measurement) -> FrontierResult:
    """Give all their decode speed: of this machine if it was to be measured, else of the last one.

    What has no shape keeps the limit that its bytes set, or has no speed.
    """
    where = machine() if measurement.speed or not result.speeds else result.speeds[-1].machine
    shapes = {Shape(s.plan, s.expert_width): s.speedup for s in result.speeds if s.machine == where}
    dense = {s.fingerprint: s.speedup for s in result.sibling_speeds if s.machine == where}

    def timed(row: FrontierRow) -> FrontierRow:
        if row.speed_is == "limit":
            return row
        speedup = shapes.get(shape) if (shape := shape_of(row)) else None
        return replace(row, speedup=speedup, speed_is="measured" if speedup else None)

    return replace(
        result,
        rows=[timed(row) for row in result.rows],
        siblings=[replace(sibling, speedup=dense.get(sibling.fingerprint)) for sibling in result.siblings],
    )

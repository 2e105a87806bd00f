"""Results for people."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.text import Text

from .. import registry
from ..results import (
    AdaptResult,
    BenchmarkResult,
    ConversionResult,
    DepthResult,
    EvaluationResult,
    FinetuneResult,
    Inspection,
    PruningResult,
)
from ..results.evaluation import perplexity_of
from .console import command, here, offer, share
from .grid import grid as _grid
from .grid import say as _say
from .modality import answer_rows, load_range, name_of, say_errors, show_modalities, show_picture_speed

BUDGET_TOLERANCE = 0.02
WHOLE = {"top-k": "one whole number of experts for all tokens", "layer-k": "a whole number of experts in each layer"}
"""What rules run that cannot meet every budget."""


def show_facts(console: Console, title: str, facts: Mapping[str, object]) -> None:
    """Two columns: what, value."""
    grid = _grid(title, "", "", wrapped=1)
    for name, value in facts.items():
        if value is None:
            continue
        text = f"{value:,}" if isinstance(value, int) else f"{value:.3f}" if isinstance(value, float) else str(value)
        grid.add_row(name.replace("_", " "), text)
    console.print(grid)


def show_conversion(console: Console, m: ConversionResult, dense: str | None = None) -> None:
    """Dense against converted, and what to do next; `dense` is the model that was converted, if it must be named."""
    more = f", {m.memory_factor:g} x in memory" if m.ffn_active > 1 else ""
    grid = _grid(f"{m.output}: plan {m.plan}, {share(m.ffn_active)} of each FFN active{more}", "", "dense", "converted")
    grid.add_row("parameters", f"{m.dense_parameters:,}", f"{m.total_parameters:,}")
    grid.add_row("active per token", f"{m.dense_parameters:,}", f"{m.active_parameters:,}")
    grid.add_row("perplexity (held-out text)", f"{m.perplexity_dense:.2f}", f"{m.perplexity:.2f}")
    grid.add_row("ratio to dense", "1", f"{m.perplexity / m.perplexity_dense:.3f}")
    for row in answer_rows(m):
        grid.add_row(*row)
    console.print(grid)
    say_errors(console, m)
    if m.trials:
        losses = ", ".join(f"{t.partition} {t.plan} {t.held_out_loss:.3f}" for t in m.trials)
        least = min(m.trials, key=lambda trial: trial.held_out_loss)
        tie = "" if (least.partition, least.plan) == (m.partition, m.plan) else "; so near, the order is chance"
        _say(console, f"{m.partition} was chosen by the loss on held-out calibration tokens: {losses}{tie}")
    if m.router:
        _say(
            console,
            f"one router ahead of the model, {m.router.parameters:,} parameters, names the best expert of a token in "
            f"{m.router.agreement:.0%} of calibration text that it did not see",
        )
    one_file = m.gguf is not None and m.gguf.output == m.output
    loaders = (
        "llama.cpp loads it"
        if one_file
        else f"{', '.join(m.engines)} load it"
        if m.engines
        else "transformers loads it after import moesaic"
    )
    _say(console, f"written as {m.format}: {m.format_reason or loaders}")
    if m.engine:
        narrow = m.engine.least_width is not None and m.expert_width < m.engine.least_width
        own = f"; in this FFN they are of {m.expert_width}" if narrow else ""
        _say(console, f"for {m.engine.engine}: {m.engine.reason}{own}")
    if m.gguf:
        others = f", {m.gguf.fallbacks} matrices in f16" if m.gguf.fallbacks else ""
        size = f"{m.gguf.outtype}, {m.gguf.bytes / 1e6:,.0f} MB{others}"
        _say(console, f"{m.gguf.output}: {size}, perplexity {m.gguf.perplexity:.2f} as read back")
    unreached = {r.layer: r.unreached_experts for r in m.layers if r.unreached_experts}
    if unreached:
        _say(console, f"no calibration token reached these experts (layer: experts): {unreached}", "yellow")
    if m.collapsed:
        _say(console, "this model collapsed; it was kept because of --force", "bold red")
    seconds = m.seconds + (m.finetune.seconds if m.finetune else 0)
    _say(console, f"{seconds:.0f} s, peak memory {m.peak_rss_bytes / 1e9:.2f} GB. Next:")
    first = ("What is it?", "--image", "picture.jpg") if m.pictures else ("def quicksort(arr):",)
    against = ("--against", here(dense)) if dense else ()
    for verb, *more in (("generate", *first), ("evaluate",), ("benchmark", *against)):
        offer(console, command("moesaic", verb, here(m.output), *more), "  ")
    if m.gguf:
        offer(console, command("llama-server", "-m", here(m.gguf.output)), "  ")


def show_made(console: Console, m: ConversionResult, dense: str | None = None) -> None:
    """Show a conversion and, if it was trained after it, what that changed."""
    show_conversion(console, m, dense)
    if m.finetune:
        show_training(console, m.finetune)


def show_training(console: Console, f: FinetuneResult) -> None:
    """Before and after, what learned, and how evenly the experts are used."""
    grid = _grid(f"{f.output}: {f.method}, {f.objective}, {f.steps} steps", "", "before", "after")
    assert f.perplexity is not None
    assert f.perplexity_before is not None
    assert f.perplexity_dense is not None
    before, after = f.load.before, f.load.after
    grid.add_row("held-out loss (nats a token)", f"{f.held_out_loss_before:.4f}", f"{f.held_out_loss:.4f}")
    grid.add_row("perplexity (held-out text)", f"{f.perplexity_before:.2f}", f"{f.perplexity:.2f}")
    ratios = [f"{found / f.perplexity_dense:.3f}" for found in (f.perplexity_before, f.perplexity)]
    grid.add_row("ratio to dense", *ratios)
    for name in ("experts_per_token", "coefficient_of_variation", "dead_experts"):
        digits = 0 if name == "dead_experts" else 2
        label = "load's " * (name == "coefficient_of_variation") + name.replace("_", " ")
        grid.add_row(label, f"{getattr(before, name):.{digits}f}", f"{getattr(after, name):.{digits}f}")
    if before.kept_experts is not None and after.kept_experts is not None:
        kept = (before.kept_experts, after.kept_experts)
        grid.add_row("tokens that keep their experts", *(f"{share:.1%}" for share in kept))
    console.print(grid)
    learned = ", ".join(f"{part} {count:,}" for part, count in f.trainable_parameters.items())
    _say(console, f"learned: {learned}; {f.tokens:,} tokens in {f.seconds:.0f} s")
    if not f.improved:
        _say(console, "held-out loss did not fall, so the model as it came was written", "yellow")
    if f.format_reason:
        _say(console, f"written as {f.format}: {f.format_reason}")


def show_adaptation(console: Console, a: AdaptResult) -> None:
    """How many experts run, and what that costs."""
    name, _ = registry.split("selection", a.method)
    grid = _grid(f"{a.output}: {name}, {a.active:.0%} of its experts run", "", "own", "adapted")
    grid.add_row("experts a token", f"{a.default_experts_per_token}", f"{a.experts_per_token:.2f}")
    for modality, count in (a.experts_by_modality or {}).items():
        grid.add_row(f"the same on {name_of(modality)}", f"{a.default_experts_per_token}", f"{count:.2f}")
    grid.add_row("held-out loss (nats a token)", f"{a.held_out_loss_default:.4f}", f"{a.held_out_loss:.4f}")
    ratio = perplexity_of(a.held_out_loss - a.held_out_loss_default)
    grid.add_row("perplexity ratio", "1", f"{ratio:.4f}")
    console.print(grid)
    layers = ", ".join(f"{count:.1f}" for count in a.experts_by_layer)
    console.print(Text(f"by layer: {layers}"))
    if a.learner:
        before = f"{a.held_out_loss_start:.4f}"
        _say(console, f"learned: {a.parameters:,} parameters in {a.steps} steps, {a.seconds:.0f} s; {before} before")
    if not a.improved:
        _say(console, "training did not make it better, so the rule as it started was written", "yellow")
    off = a.active / a.target_active - 1
    if abs(off) > BUDGET_TOLERANCE:
        why = f"{name} runs {WHOLE[name]}" if name in WHOLE else "more --tokens make that smaller"
        fitted = a.calibrated_experts_per_token
        near = "" if fitted is None else f" ({fitted:.2f} experts on the calibration tokens)"
        _say(console, f"{off:+.1%} from the budget on held-out text{near}; {why}", "yellow")
    if name == "relative":
        rule = registry.build("selection", a.method)
        _say(console, f"the same in ik_llama.cpp: -ser {rule.at_least},{rule.threshold:.4f} "
             f"--override-kv ARCH.expert_used_count=int:{rule.at_most or a.num_experts}")  # fmt: skip
    assert a.output is not None
    _say(console, "Next:")
    model = [here(a.output)] if a.inside else [here(a.model), "--adapter", here(a.output)]
    for verb, *prompt in (("generate", "The first"), ("evaluate",), ("benchmark",)):
        offer(console, command("moesaic", verb, model[0], *prompt, *model[1:]), "  ")


def show_evaluation(console: Console, r: EvaluationResult) -> None:
    """Perplexity with its protocol, then tasks."""
    measured = f"({r.protocol}, {r.tokens:,} tokens, window {r.window}, {r.text}, sha256 {r.data_sha256[:12]})"
    console.print(Text.assemble("perplexity ", (f"{r.perplexity:.4f}", "bold"), f"  {measured}"))
    if r.bits_per_byte is not None:
        _say(console, f"{r.bits_per_byte:.4f} bits per byte of text, which compares models with different tokenizers")
    if r.tasks:
        grid = _grid("Zero-shot", "task", "acc", "± stderr", "acc_norm", "n")
        for task, v in r.tasks.items():
            numbers = ["-" if value is None else f"{value:.3f}" for value in (v.acc, v.stderr, v.acc_norm)]
            grid.add_row(task, *numbers, str(v.n))
        console.print(grid)


def _short(number: float) -> str:
    for least, unit in ((1e6, "M"), (1e3, "k")):
        if number >= 10 * least:
            return f"{number / least:.0f}{unit}" if number >= 100 * least else f"{number / least:.1f}{unit}"
    return f"{number:.0f}" if number >= 100 else f"{number:.1f}"


def show_benchmark(console: Console, r: BenchmarkResult, against: str = "dense") -> None:
    """Speeds as ratios to those of the model that is compared with, and to the limit."""
    grid = _grid(
        f"Speed on {r.machine}, {r.threads} threads, {r.dtype}",
        "", "MoE tok/s (range)", against, "speed-up", "limit", "reached",
    )  # fmt: skip
    kinds = (("decode, batch {}", r.decode), ("prefill, {}", r.prefill), ("FFN block, {} tok", r.block))
    for label, rows in kinds:
        for size, v in rows.items():
            low, high = map(_short, v.tokens_per_s_range)
            grid.add_row(
                label.format(size), f"{_short(v.tokens_per_s)} ({low}-{high})", _short(v.dense_tokens_per_s),
                f"{v.speedup:.2f}x", f"{v.limit:.2f}x", f"{v.share_of_limit:.0%}",
            )  # fmt: skip
    console.print(grid)
    if r.picture:
        show_picture_speed(console, r.picture)
    _say(console, r.protocol, "dim")


def show_inspection(console: Console, f: Inspection) -> None:
    """Shape, method and a row a layer."""
    m = f.metrics
    facts = {"model": f.model, "architecture": f.architecture, "plan": m.plan, "bytes": f.bytes, **f.moe}
    facts |= {name: f.config[name] for name in ("partition", "recovery", "tokens", "seed")}
    facts |= {"dense_layers": f.config.get("dense_layers")}
    facts |= {"perplexity_dense": m.perplexity_dense, "perplexity": m.perplexity}
    if m.pictures:
        facts |= {
            "perplexity of answers, dense": m.pictures.perplexity_dense,
            "perplexity of answers": m.pictures.perplexity, "agreement in answers": m.pictures.agreement,
        }  # fmt: skip
    show_facts(console, f.folder, facts)
    grid = _grid("Layers", "layer", "split", "after", "residual", "sinks", "load", "unreached", "s")
    for r in m.layers:
        grid.add_row(
            str(r.layer), f"{r.split_error:.3f}", f"{r.error:.3f}", 
            "-" if r.residual_error is None else f"{r.residual_error:.3f}",
            "-" if r.sink_norm is None else f"{r.sink_norm:.2f}", load_range(r.expert_tokens),
            str(len(r.unreached_experts)), f"{r.seconds:.1f}",
        )  # fmt: skip
    console.print(grid)
    show_modalities(console, m.layers)
    for change in m.changes or []:
        _say(console, f"then {change.verb} ({change.method}): {change.what}; perplexity {change.perplexity:.2f}, "
             f"{change.perplexity_before:.2f} before. Errors of layers are from before.", "yellow")  # fmt: skip
    console.print(
        "relative errors: of the FFN as split and after recovery, of the residual stream\n"
        "sinks: norm of attention sinks, 1 is the dense model's\n"
        "load: tokens of the least and most used expert, 1 is an even share",
        style="dim",
    )


def show_pruning(console: Console, p: PruningResult | DepthResult) -> None:
    """Source against pruned, and what to do next."""
    deep = isinstance(p, DepthResult)
    what, few, all_ = ("layers", p.num_hidden_layers, p.num_hidden_layers_before) if deep else ("experts a layer",
                       p.num_experts, p.num_experts_before)  # fmt: skip
    grid = _grid(f"{p.output}: {few} of {all_} {what.split()[0]}, by {p.method}", "", "before", "pruned")
    grid.add_row(what, f"{all_:,}", f"{few:,}")
    grid.add_row("parameters", f"{p.total_parameters_before:,}", f"{p.total_parameters:,}")
    grid.add_row("perplexity (held-out text)", f"{p.perplexity_before:.2f}", f"{p.perplexity:.2f}")
    console.print(grid)
    for note in p.notes:
        _say(console, note, "yellow")
    if deep:
        _say(console, f"layers left out: {', '.join(map(str, p.removed_layers)) or 'none'}")
    experts = [] if deep else p.layers
    unreached = {r.layer: [e for e, n in zip(r.kept, r.expert_tokens, strict=False) if not n] for r in experts}
    if any(unreached.values()):
        some = {layer: experts for layer, experts in unreached.items() if experts}
        _say(console, f"no calibration token runs these kept experts (layer: experts): {some}", "yellow")
    if p.collapsed:
        _say(console, "this model collapsed; it was kept because of --force", "bold red")
    if p.max_abs_logit_error is None:
        _say(console, "it does not fit in memory, so it was not loaded whole to check it", "yellow")
    _say(console, f"{p.seconds:.0f} s, peak memory {p.peak_rss_bytes / 1e9:.2f} GB. Next:")
    for verb, *prompt in (("generate", "The first"), ("evaluate",)):
        offer(console, command("moesaic", verb, here(p.output), *prompt), "  ")

"""How many experts run for which tokens, and how many would be best, for people."""

from __future__ import annotations

from rich.console import Console

from ..results import ExpertsInspection, OracleInspection, RoutesInspection
from .grid import grid, say

WIDE = 72


def show_experts(console: Console, e: ExpertsInspection) -> None:
    """Print mean numbers of experts by layer, kind of token, domain and difficulty."""
    say(console, experts_title(e), "bold")
    say(console, experts_lead(e))
    lines = [""]
    for layer, experts in zip(e.layers, e.experts_by_layer, strict=True):
        cell = f"{layer}: {experts:.2f}"
        if len(lines[-1]) + len(cell) > WIDE:
            lines.append("")
        lines[-1] += cell + "   "
    say(console, "\n".join(["by layer", *(f"  {line.rstrip()}" for line in lines)]))
    table = grid("", "tokens by", "tokens", "experts", "loss (nats)", wrapped=0)
    for name, rows in (("kind", e.by_kind), ("domain", e.by_domain), ("difficulty", e.by_difficulty)):
        table.add_section()
        table.add_row(name, style="bold")
        for row, found in rows.items():
            table.add_row(f"  {row}", f"{found.tokens:,}", f"{found.experts_per_token:.2f}", f"{found.loss:.3f}")
    console.print(table)
    say(console, "difficulty: quarters of the tokens by the loss of predicting the next one", "dim")


def experts_title(e: ExpertsInspection) -> str:
    """Name what was looked at."""
    return f"{e.model or 'the model'}: experts a token" + (f", {e.rule}" if e.rule else "")


def experts_lead(e: ExpertsInspection) -> str:
    """Say the means in a sentence or two."""
    own = e.default_experts_per_token
    found = (
        f"{e.experts_per_token:.2f} of {e.num_experts} experts run for a token on average (the routers' own number: "
        f"{own}), loss {e.loss:.4f} nats; {e.tokens:,} tokens of {e.text}."
    )
    return found if e.varies else f"{found} The number is the same for all tokens of a layer."


def show_oracle(console: Console, o: OracleInspection) -> None:
    """Print the policy between a fixed number of experts and the oracle."""
    say(console, f"{o.model or 'the model'}: the best number of experts" + (f", {o.rule}" if o.rule else ""), "bold")
    table = grid("", f"{o.tokens:,} tokens", "experts", "loss (nats)", "")
    budget = f"{o.experts_per_token:.2f}"
    table.add_row("the same number for all", budget, f"{o.fixed_loss:.4f}", "interpolated")
    table.add_row("what runs now", budget, f"{o.loss:.4f}", "")
    table.add_row("oracle", f"{o.oracle_experts_per_token:.2f}", f"{o.oracle_loss:.4f}", "chosen by the next token")
    table.add_row("  its choices in one run", "", f"{o.oracle_loss_together:.4f}", "")
    if o.experts_by_layer is not None:
        mean = sum(o.experts_by_layer) / len(o.experts_by_layer)
        table.add_row("  a number for each layer", f"{mean:.2f}", f"{o.by_layer_loss:.4f}", "")
    console.print(table)
    table = grid("", "experts", *map(str, o.counts))
    table.add_row("loss, all tokens", *(f"{loss:.3f}" for loss in o.loss_by_count))
    for name, counts in (("tokens now", o.policy_tokens), ("tokens, oracle", o.oracle_tokens)):
        table.add_row(name, *(f"{count / o.tokens:.0%}" for count in counts))
    console.print(table)
    say(
        console,
        f"{o.same:.0%} of the tokens run the oracle's number, rounded; the mean distance is {o.mean_distance:.2f}",
    )
    say(console, gap(o.gap_closed))
    say(console, "the oracle sees the next token, so no rule reaches it", "dim")


def gap(closed: float | None) -> str:
    """Say how far a policy is on the way from a fixed number to the oracle."""
    if closed is None:
        return "the oracle wins nothing over the same number for all"
    if closed < 0:
        return (
            f"what runs now is worse than the same number for all, by {-closed:.1%} of what the oracle wins over that"
        )
    return f"what runs now closes {closed:.1%} of the gap between the same number for all and the oracle"


def show_routes(console: Console, r: RoutesInspection) -> None:
    """Print what a trace holds, and how much neighbouring tokens have in common."""
    say(console, f"{r.file}: experts of {r.tokens:,} tokens" + (f", {r.rule}" if r.rule else ""), "bold")
    say(
        console,
        f"{r.requests} requests of {r.prompt} tokens and {r.new} new ones, from {r.text}; {len(r.layers)} layers of "
        f"{r.num_experts} experts, {r.experts_per_token:.2f} run for a token. {r.kept:.0%} of a token's experts are "
        f"those of the token before it too; {r.used:.0%} of all experts are used at all.",
    )
    if not r.caches:
        return
    policies = list(r.caches[0].hit_ratio)
    names = [{"belady": "best possible"}.get(name, name) for name in policies]
    table = grid("Found in memory when decoding, by --expert-memory and --cache", "", "experts", *names, "read a token")
    for each in r.caches:
        read = "" if each.bytes_read_per_token is None else f"{each.bytes_read_per_token / 1e6:.3g} MB"
        hits = [f"{each.hit_ratio[name]:.0%}" for name in policies]
        table.add_row(f"{each.share:.0%}", f"{each.capacity:,}", *hits, read)
    console.print(table)
    say(console, f"one request at a time; what a token reads with {names[0]}, without what is read in vain", "dim")

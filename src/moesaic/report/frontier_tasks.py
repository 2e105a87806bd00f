"""The frontier's second chart, where tasks were measured: accuracy over the share of each FFN that runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..results import FrontierResult, FrontierSummary
from .frontier import Line, chosen_lines, lines_of
from .frontier_plot import LABEL, styles_of
from .plots import INK, new_figure, optional

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def dense_accuracy(result: FrontierResult) -> float | None:
    """Find the dense model's mean accuracy over tasks, if there are any."""
    mean = result.dense.tasks.get("mean") if result.dense else None
    return mean.acc if mean else None


@optional
def write_tasks(result: FrontierResult, model: str, folder: Path) -> None:
    """Draw `frontier_tasks.png`: the lines of `frontier.png` by mean accuracy over tasks, if there are any.

    Args:
        result: what `frontier.json` holds.
        model: what was converted, for the title.
        folder: where to put the file.
    """
    if dense_accuracy(result) is not None:
        draw_tasks(result, model).savefig(folder / "frontier_tasks.png", dpi=150)


def draw_tasks(result: FrontierResult, model: str) -> Figure:
    """Draw the chart; bars are standard errors over items."""
    from matplotlib.ticker import FixedLocator, PercentFormatter

    lines = chosen_lines(lines_of(result.summary))
    styles, dense = styles_of(lines), dense_accuracy(result)
    assert dense is not None
    figure = new_figure(8.4, 4.4)
    panel = figure.subplots()
    for line in lines:
        points = _measured(line)
        color, dashes, marker = styles[line]
        panel.errorbar(
            [point.ffn_active for point in points], [point.tasks_mean or 0 for point in points],
            [point.tasks_stderr or 0 for point in points], linestyle=dashes, marker=marker, color=color, capsize=2,
            elinewidth=1, linewidth=2.4 if line.ours else 1.4, label=line.label, zorder=2 + line.ours,
        )  # fmt: skip
    panel.plot([1], [dense], "o", color=INK, markersize=5)
    panel.axhline(dense, color=INK, linewidth=0.8, linestyle=":")
    panel.annotate(f"dense {dense:.3f}", (1.09, dense), (0, -11), textcoords="offset points", fontsize=LABEL)
    panel.set(
        xlabel="share of each FFN that runs per token", ylabel="accuracy, mean over tasks", xlim=(1.1, 0.2),
        title=f"{model} as a Mixture-of-Experts: accuracy",
    )  # fmt: skip
    panel.xaxis.set_major_locator(FixedLocator([1, 0.75, 0.5, 0.25]))
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_formatter(PercentFormatter(1))
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize=LABEL, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.tight_layout()
    return figure


def _measured(line: Line) -> list[FrontierSummary]:
    return [point for point in line.points if point.tasks_mean is not None]

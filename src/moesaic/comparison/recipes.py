"""The frontier's methods: what each line is converted with, our own and the published ones, and the bounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .. import registry
from ..errors import InputError

NEURONS = "neurons"
"""The method that stands for the finest routing: every token its own best neurons."""
ORACLE = "oracle"
"""The router that is a bound: it runs all experts to find the best."""
ALL = "all"
"""In place of names: every method that fits the model, its shape and the text."""


@dataclass(frozen=True)
class Method:
    """What one line of the frontier is converted with."""

    partition: str
    recovery: str = "closed-form"
    router: str | None = None
    groups: int | None = None
    """Of its plan; None for the few that `--active` gives and CPUs run fast."""
    fine: bool = False
    """`auto` tries the fine cut too."""


METHODS = {
    "default": Method("auto"),
    "default-fine": Method("auto", fine=True),
    "specialists": Method("specialists"),
    "specialists-centroid": Method("specialists:alternations=0", router="centroid"),
    "coactivation": Method("coactivation"),
    "coactivation-fine": Method("coactivation", groups=64),
    "coactivation-128": Method("coactivation", groups=128),
    "static+closed-form": Method("static"),
    "static-weighted+closed-form": Method("static:weighted=True"),
    "flap": Method("static", "none"),
    "cmoe": Method("cmoe", "none"),
    "cmoe-code": Method("cmoe:iterations=1,final_centroids=True", "none"),
    "expertweaver": Method("expertweaver", "none", groups=64),
    "expertweaver-coarse": Method("expertweaver", "none"),
    "moefication": Method("moefication", "none", groups=64),
    "moefication-coarse": Method("moefication", "none"),
    "llama-moe": Method("random", "none"),
    "read-me": Method("domains", "none"),
    "coactivation-oracle": Method("coactivation", "none", ORACLE),
}
"""Lines by name; the published methods without recovery, as published: CMoE's paper has 8 experts (its code, a line of
its own, differs), ExpertWeaver's 64 (arXiv 2602.15521, §4.1), MoEfication's code 128."""


@dataclass(frozen=True)
class BaselineRecipe:
    """What one line of the frontier that is no conversion is made with."""

    file: str
    """Of `comparison/baselines`."""
    options: dict[str, bool | str] = field(default_factory=dict)
    """Fields of its method."""


HEALED: dict[str, bool | str] = {"recovery": "closed-form"}
BASELINES = {
    "depth": BaselineRecipe("depth"),
    "depth+closed-form": BaselineRecipe("depth", HEALED),
    "depth-contiguous": BaselineRecipe("depth", {"contiguous": True}),
    "depth-contiguous+closed-form": BaselineRecipe("depth", HEALED | {"contiguous": True}),
    "cats": BaselineRecipe("cats"),
    "cats+closed-form": BaselineRecipe("cats", HEALED),
    "cats-top-k": BaselineRecipe("cats", {"top_k": True}),
    "teal": BaselineRecipe("teal"),
    "wina": BaselineRecipe("wina"),
    NEURONS: BaselineRecipe("neurons"),
}
"""What practitioners would pick, and bounds, by name: fewer layers (ShortGPT, arXiv 2403.03853; contiguous: arXiv
2403.17887), neurons by their gate (CATS, arXiv 2404.08763; each token's largest bound what thresholds reach), inputs of
FFNs by size (TEAL, arXiv 2408.14690; WINA, arXiv 2505.19427), each token's own best neurons."""


def chosen(names: Sequence[str]) -> list[str]:
    """List the methods of these names, `all` expanded.

    Raises:
        InputError: an unknown name; the message has the nearest.
    """
    known = [*METHODS, *BASELINES]
    for name in names:
        if name not in (*known, ALL):
            raise InputError(
                f"unknown method '{name}'.{registry.nearest(name, known)} Choose from: {', '.join(known)}, or {ALL}."
            )
    return known if ALL in names else list(names)


def may_overlap(name: str) -> bool:
    """Tell whether memory beyond the dense model's is of use to the method."""
    if name in BASELINES:
        return False
    partition = METHODS[name].partition
    return partition == "auto" or registry.build("partition", partition).overlapping

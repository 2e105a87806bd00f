"""What a pruned model says of itself, and whether transformers reads what was written.

Shapes: L tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import yaml
from torch import Tensor
from transformers import PreTrainedModel

from ..checkpoint.facts import saved_result, saved_settings
from ..checkpoint.reader import Checkpoint
from ..checkpoint.writer import CONFIG_FILE, ResumableOutput
from ..compat import tied_weights
from ..errors import WorkError
from ..evaluation.cost import at_share, sizes
from ..formats.base import block_config
from ..formats.converted import Converted
from ..formats.export import write_metrics
from ..formats.verify import TOLERANCE, check
from ..machine import free_memory, give_back_memory
from ..models.families import empty
from ..models.layerwise import LayerwiseModel
from ..moe.modeling import MODEL_TYPE
from ..plan import Plan
from ..report.card import METADATA
from ..results import DepthResult, Json, LayerRecord, PrunedLayer, PruningResult
from ..serving.loading import load
from .sources import ConvertedSource

RESULT_FILE = "pruning.json"
CARD = """\
---
{metadata}---
# {model} with {left}

Pruned from `{model}` by [moesaic](https://pypi.org/project/moesaic) {version}: method `{p.method}`, recovery
`{p.recovery}`{how}. Architecture and tensor names are the source's, so what loads that loads this.

| | before | this model |
|---|---|---|
| parameters | {p.total_parameters_before:,} | {p.total_parameters:,} |
| perplexity | {p.perplexity_before:.3f} | {p.perplexity:.3f} |

Perplexity: {text.text}, {text.tokens} tokens in windows of {text.window}, data sha256 `{text.data_sha256:.16}`.
Everything else is in `moesaic.yaml` and `pruning.json`. The licence is the source's; its files are here too, if it had
any.
"""


def parameters(model: PreTrainedModel) -> int:
    """Count a model's parameters, tied ones once."""
    tied = tied_weights(model)  # on the meta device they are parameters of their own
    return sum(p.numel() for name, p in model.named_parameters() if name not in tied)


def check_collapse(result: PruningResult | DepthResult, more: str, partial: ResumableOutput, force: bool) -> None:
    """Check that the pruned model still has its language; `more` is what to keep of it.

    Raises:
        WorkError: it has lost it, and `force` does not accept that.
    """
    if result.collapsed and not force:
        raise WorkError(
            f"the pruned model collapsed: perplexity {result.perplexity:.4g}, {result.perplexity_before:.4g} before. "
            f"Keep {more}; '{partial.folder}' is kept, and the same command with --force accepts the result"
        )


@torch.no_grad()
def stock_error(made: Path, layerwise: LayerwiseModel, tokens_1L: Tensor, expected_LV: Tensor) -> float | None:
    """Measure the largest difference of logits between the model as it loads and the run layer by layer.

    None if the model does not fit in half of the free memory.

    Raises:
        WorkError: it does not load, logits are NaN or infinite, or log-probabilities are off by more than `TOLERANCE`
            in half of the tokens.
    """
    checkpoint = Checkpoint(made)
    needed = checkpoint.size() * layerwise.dtype.itemsize / checkpoint.dtype().itemsize
    if needed > free_memory(layerwise.device) / 2:
        return None
    model = load(made, dtype=layerwise.dtype, device=layerwise.device).model
    found_LV = model(input_ids=tokens_1L.to(layerwise.device), use_cache=False).logits[0].float().cpu()
    del model
    give_back_memory()
    if not found_LV.isfinite().all():
        raise WorkError("logits of the pruned model, as transformers loads it, are NaN or infinite")
    difference_L = (found_LV.log_softmax(-1) - expected_LV.log_softmax(-1)).abs().where(expected_LV > -20, 0).amax(-1)
    if not difference_L.median() <= TOLERANCE:
        raise WorkError(
            f"the pruned model, as transformers loads it, differs by {difference_L.median():.3g} nats in half of the "
            f"tokens from its run layer by layer, more than {TOLERANCE}"
        )
    return (found_LV - expected_LV).abs().max().item()


def finish_stock(
    made: Path, settings: Json, result: PruningResult | DepthResult, *, experts: bool = True, pictures: bool = False
) -> None:
    """Write `moesaic.yaml` and the model card of a stock model that was pruned.

    Args:
        made: its folder.
        settings: what `moesaic.yaml` says.
        result: what the card says.
        experts: whether it has any.
        pictures: whether it takes any.
    """
    (made / CONFIG_FILE).write_text(yaml.safe_dump(settings, sort_keys=False))
    if isinstance(result, DepthResult):
        left = f"{result.num_hidden_layers} of {result.num_hidden_layers_before} decoder layers"
        how = f"; layers {result.removed_layers} are left out"
    else:
        left, how = f"{result.num_experts} of {result.num_experts_before} experts a layer", f", seed {result.seed}"
    task = "image-text-to-text" if pictures else "text-generation"
    metadata: Json = {"library_name": "transformers", "pipeline_tag": task}
    metadata |= {name: settings[name] for name in METADATA if settings.get(name)}
    metadata["tags"] = [*["mixture-of-experts"] * experts, "moesaic"]
    text = CARD.format(
        metadata=yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True), model=result.model, p=result,
        version=result.versions["moesaic"], text=result.perplexity_protocol, left=left, how=how,
    )  # fmt: skip
    (made / "README.md").write_text(text, encoding="utf-8")


def finish_converted(source: ConvertedSource, folder: Path, made: Path, settings: Json, result: PruningResult) -> None:
    """Write `moesaic.yaml`, `metrics.json` and card of a converted model that was pruned, and check its stock form.

    Raises:
        WorkError: the check failed.
    """
    whole, format = source.config(result.num_experts), source.converted.format
    config = block_config(whole)
    groups = config.n_shared_experts + config.num_experts
    plan = Plan(config.n_shared_experts, config.num_experts_per_tok, groups, config.moe_intermediate_size)
    counted, before = sizes(empty(whole), plan, format), saved_result(folder)
    counted_result = replace(
        before, ffn_active=counted.ffn_active, active_parameters=counted.active_parameters,
        total_parameters=counted.total_parameters, memory_factor=counted.memory_factor,
    )  # fmt: skip
    saved = saved_settings(folder)
    worse = not result.perplexity / before.perplexity_dense <= saved["config"]["collapse_ratio"]
    metrics = replace(
        at_share(counted_result, config, before.ffn_active), output=result.output, plan=str(plan), pictures=None,
        collapsed=result.collapsed or worse, check=None,
        layers=[record(old, new) for old, new in zip(before.layers, result.layers, strict=True)],
    ).changed(
        "pruned", result.method, f"{result.num_experts} of {result.num_experts_before} experts a layer, recovery "
        f"{result.recovery}", result.perplexity,
    )  # fmt: skip
    saved |= {"pruning": settings["pruning"], "plan": str(plan)}
    (made / CONFIG_FILE).write_text(yaml.safe_dump(saved, sort_keys=False))
    found = check(Converted(made), made) if format.name != MODEL_TYPE else None
    write_metrics(made, metrics.to_dict(), format, found)


def record(before: LayerRecord, pruned: PrunedLayer) -> LayerRecord:
    """Correct what a conversion's record says of a layer's experts."""
    if not pruned.expert_tokens:
        return before
    unreached = [e for e, count in enumerate(pruned.expert_tokens) if not count]
    return replace(
        before, expert_tokens=pruned.expert_tokens, unreached_experts=unreached, expert_tokens_by_modality=None,
        error_by_modality=None, residual_error=None,
    )  # fmt: skip

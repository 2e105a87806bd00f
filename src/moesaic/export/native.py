"""Write a converted model as a stock architecture, a layer at a time, and see that stock transformers agrees."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from .. import registry
from ..errors import WorkError
from ..models.checkpoint import Checkpoint
from ..models.converted import HEAD, NOTE, Converted
from ..models.loading import load_tokenizer
from ..models.native import NativeForm
from ..models.sources import resolve
from ..models.working import MODEL_TYPE
from ..models.writer import MARK, OUTER, ResumableOutput, check_output, check_space
from .card import write_card
from .check import check

COPIED = (MARK, "metrics.json", "generation_config.json", "layer_error.png", "activation_rates.png", "expert_load.png")
CARD = """\
# {{ name }}: {{ form }}, written by moesaic

{{ c.num_experts_per_tok }} of {{ c.num_experts }} experts of {{ c.moe_intermediate_size }} neurons run beside a shared
one of {{ c.shared_expert_intermediate_size }}; converted from a dense `{{ c.dense_model_type }}`. Any of these loads
it, without moesaic:

```bash
python -c 'from transformers import pipeline; print(pipeline("text-generation", "{{ name }}")("The first"))'
vllm serve {{ name }}
python -m sglang.launch_server --model-path {{ name }}
python -m mlx_lm generate --model {{ name }} --prompt "The first"
```

When it was written, stock transformers gave the log-probabilities of the converted model: in float32, over
{{ check.tokens }} tokens, a median difference of {{ "%.1e" | format(check.median_difference) }} nats and the same most
likely token in {{ "%.1f" | format(100 * check.agreement) }} %. The other commands were not run.
`moesaic export {{ name }} OUT --to moesaic` gives the working form back, bit by bit.
"""


def export(
    model: str | Path,
    output: str | Path,
    to: str = "glm4_moe",
    *,
    resume: bool = True,
    overwrite: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Write a converted model in another form: `glm4_moe` for any engine, `moesaic` for the working form.

    A layer's tensors are in memory at a time; the check at the end loads both models in float32, one after the other.

    Args:
        model: the folder of a converted model, in either form.
        output: the folder to make; it appears only when the check has passed.
        to: the form.
        resume: go on with an unfinished export of the same model.
        overwrite: replace `output` if it exists.
        progress: called with (finished layers, all layers, what is being done).

    Returns:
        `output, form, bytes, median_difference` (nats), `agreement` (share of tokens), `tokens`.

    Raises:
        InputError: no converted model, an unknown form, or one that cannot express this model.
        WorkError: the check failed; nothing is left behind.
    """
    output, folder = Path(output), resolve(str(model))
    form: NativeForm = registry.build("export", to)
    source = Converted(folder)
    config = form.config(source.config)
    check_output(output, overwrite)
    check_space(output, source.checkpoint.size())
    report = progress or (lambda done, count, note: None)
    fingerprint = {"model": source.checkpoint.fingerprint(), "form": config["model_type"]}
    partial = ResumableOutput(output, fingerprint, resume)
    count = source.config.num_hidden_layers
    for index in range(len(partial.layers), count):
        report(index, count, "writing")
        tensors = form.layer(source.layer(index), source.config)
        partial.add_layer({source.prefix(index) + name: tensor for name, tensor in tensors.items()}, {}, {})
    write_rest(partial, source, config)
    report(count, count, "checking")
    found: dict[str, Any] = {}
    try:
        partial.finish(lambda made: found.update(check(source, made, to)))
    except WorkError:
        shutil.rmtree(partial.folder)
        raise
    facts = {"output": str(output), "form": config["model_type"], "bytes": Checkpoint(output).size(), **found}
    write_readme(facts, source, output)
    return facts


def write_rest(partial: ResumableOutput, source: Converted, config: dict[str, Any]) -> None:
    """Everything in OUT that is not a layer: outer weights, configuration, tokenizer, metrics and plots."""
    folder, native = source.checkpoint.folder, config["model_type"] != MODEL_TYPE
    outer = source.outer()
    if native and source.config.tie_word_embeddings:
        outer[HEAD] = outer["model.embed_tokens.weight"].clone()
    partial.write(OUTER, outer)
    written = config | {NOTE: source.fields} if native else source.fields
    (partial.folder / "config.json").write_text(json.dumps(written, indent=2) + "\n")
    load_tokenizer(folder).save_pretrained(partial.folder)
    for name in COPIED:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, partial.folder / name)


def write_readme(facts: dict[str, Any], source: Converted, folder: Path) -> None:
    """Write `README.md`: how each engine runs a native form, or the working form's card."""
    if facts["form"] == MODEL_TYPE:
        resolved = yaml.safe_load((folder / MARK).read_text())
        write_card(json.loads((folder / "metrics.json").read_text()) | {"output": str(folder)}, resolved, folder)
        return
    template = Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(CARD)
    text = template.render(name=folder.name, form=facts["form"], c=source.config, check=facts)
    (folder / "README.md").write_text(text, encoding="utf-8")

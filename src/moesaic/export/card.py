"""The model card: what was done to which model, what it measures, how to use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

CARD = """\
---
library_name: moesaic
tags: [mixture-of-experts, moesaic]
---
# {{ model }} as a Mixture-of-Experts, {{ m.plan }}

Converted from the dense model `{{ model }}` by [moesaic](https://pypi.org/project/moesaic) {{ m.versions.moesaic }},
without training: {{ "%.0f" | format(100 * m.ffn_active) }} % of each feed-forward network runs per token.

| | dense | this model |
|---|---|---|
| parameters | {{ "{:,}".format(m.dense_parameters) }} | {{ "{:,}".format(m.total_parameters) }} |
| active per token | {{ "{:,}".format(m.dense_parameters) }} | {{ "{:,}".format(m.active_parameters) }} |
| perplexity | {{ "%.3f" | format(m.perplexity_dense) }} | {{ "%.3f" | format(m.perplexity) }} |

Perplexity: {{ m.perplexity_protocol.text }}, {{ m.perplexity_protocol.tokens }} tokens in windows of
{{ m.perplexity_protocol.window }}, data sha256 `{{ m.perplexity_protocol.data_sha256[:16] }}`.
{%- if m.collapsed %}

**This model collapsed: it was kept only because of `--force`.**
{%- endif %}

Method: partition `{{ c.partition }}`, router `{{ c.router }}`, recovery `{{ c.recovery }}`, {{ c.tokens }} calibration
tokens of {{ c.calibration | join(", ") or "the bundled text" }}, seed {{ c.seed }}. Converted in
{{ "%.0f" | format(m.seconds) }} s on {{ m.machine }} (torch {{ m.versions.torch }}, transformers
{{ m.versions.transformers }}). Everything else is in `moesaic.yaml` and `metrics.json`.

![layer error](layer_error.png)

## Use

```python
import moesaic  # registers the architecture
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{{ folder }}")
tokenizer = AutoTokenizer.from_pretrained("{{ folder }}")
```

The licence is that of the dense model.
"""


def write_card(metrics: dict[str, Any], resolved: dict[str, Any], folder: Path) -> None:
    """Write `README.md` into a finished conversion."""
    template = Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(CARD)
    name = Path(metrics["output"]).name
    text = template.render(m=metrics, c=resolved["config"], model=resolved["model"], folder=name)
    (folder / "README.md").write_text(text, encoding="utf-8")

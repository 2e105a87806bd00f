"""The model card: what was done to which model, what it measures, how to use it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import yaml
from jinja2 import Environment, StrictUndefined

from ..results import ConversionResult, Json
from .console import command, here, share
from .modality import mean_errors, name_of

CARD = """\
---
{{ metadata }}---
# {{ model }} as a Mixture-of-Experts, {{ m.plan }}

Converted from the dense model `{{ model }}` by [moesaic](https://pypi.org/project/moesaic) {{ m.versions.moesaic }},
without training: {% if m.ffn_active > 1 -%}
{{ share }} of each feed-forward network runs per token, in copies for training to tell apart, and
{{ "%.3g" | format(m.memory_factor) }} x is in memory.
{%- else -%}
{{ "%.0f" | format(100 * m.ffn_active) }} % of each feed-forward network runs per token.
{%- endif %}
{%- if c.get("dense_layers") %} Layers `{{ c.dense_layers }}`, counted from 0, keep their dense network.{% endif %}

| | dense | this model |
|---|---|---|
| parameters | {{ "{:,}".format(m.dense_parameters) }} | {{ "{:,}".format(m.total_parameters) }} |
| active per token | {{ "{:,}".format(m.dense_parameters) }} | {{ "{:,}".format(m.active_parameters) }} |
| perplexity | {{ "%.3f" | format(m.perplexity_dense) }} | {{ "%.3f" | format(m.perplexity) }} |
{%- if m.pictures %}
| perplexity of answers on pictures | {{ "%.3f" | format(m.pictures.perplexity_dense) }} |{# #}
{{- " %.3f" | format(m.pictures.perplexity) }} |
{%- for modality, error in errors.items() %}
| error of an FFN on {{ modality }}, mean over layers | 0 | {{ "%.3f" | format(error) }} |
{%- endfor %}
{%- endif %}

Perplexity: {{ m.perplexity_protocol.text }}, {{ m.perplexity_protocol.tokens }} tokens in windows of
{{ m.perplexity_protocol.window }}, data sha256 `{{ m.perplexity_protocol.data_sha256[:16] }}`.
{%- if m.pictures %} Answers: {{ m.pictures.answer_tokens }} tokens of answers to questions about bundled held-out
pictures
{%- if m.pictures.agreement is not none %}; dense and converted model put the same token first in
{{ "%.1f" | format(100 * m.pictures.agreement) }} %
{%- endif %}.
The vision tower is the dense model's; only the language tower was converted
{{- "." if m.pictures.calibrated else ", calibrated on text alone." }}
{%- endif %}
{%- if m.finetune and m.finetune.improved %}

{%- set f = m.finetune %}

Then trained (`{{ f.method }}`, objective `{{ f.objective }}`) on {{ "{:,}".format(f.tokens) }} tokens in
{{ "%.0f" | format(f.seconds) }} s: perplexity {{ "%.3f" | format(f.perplexity_before) }} before,
{{ "%.3f" | format(f.perplexity or m.perplexity) }} after; loss on {{ "{:,}".format(f.held_out_tokens) }} held-out
tokens {{ "%.4f" | format(f.held_out_loss_before) }} and {{ "%.4f" | format(f.held_out_loss) }} nats.

![training](training.png)
{%- endif %}
{%- for change in m.changes or [] %}

Then {{ change.verb }} (`{{ change.method }}`): {{ change.what }}; perplexity
{{ "%.3f" | format(change.perplexity_before) }} before, {{ "%.3f" | format(change.perplexity) }} after.
{%- endfor %}
{%- if m.collapsed %}

**This model collapsed: it was kept only because of `--force`.**
{%- endif %}

Method: partition `{{ c.partition }}`, router `{{ c.router }}`, selection `{{ selection }}`, recovery
`{{ c.recovery }}`, {{ c.tokens }} calibration tokens of
{{ c.calibration | join(", ") or bundled }}, seed {{ c.seed }}. Converted in
{{ "%.0f" | format(m.seconds) }} s on {{ m.machine }} (torch {{ m.versions.torch }}, transformers
{{ m.versions.transformers }}). Everything else is in `moesaic.yaml` and `metrics.json`.

{% if not m.changes -%}
![layer error](layer_error.png)

{% endif -%}

## Use
{% if engines %}
This is `{{ architecture }}` of stock transformers; engines load it without moesaic:
{% if takes_pictures %}
{{ ask_in_python }}
{%- else %}
```bash
{%- for engine in engines %}
{{ commands[engine] }}{{ flags.get(engine, "") }}
{%- endfor %}
```
{% endif %}
When it was written, stock transformers gave the log-probabilities of moesaic's own format: in float32, over
{{ m.check.tokens }} random tokens and {{ m.check.layers }} layers, a median difference of
{{ "%.1e" | format(m.check.median_difference) }} nats and the same most likely token in
{{ "%.1f" | format(100 * m.check.agreement) }} %.{% if not takes_pictures %} The other commands were not run.{% endif %}
{%- if m.gguf %} For llama.cpp: `{{ serve_gguf }}` ({{ m.gguf.outtype }},
perplexity {{ "%.3f" | format(m.gguf.perplexity) }} as read back).
{%- elif gguf %} For llama.cpp: `{{ to_gguf }}`.
{%- else %} llama.cpp has nothing for it.
{%- endif %}
{% elif takes_pictures %}
{{ ask_in_python }}
{%- else %}
```python
import moesaic  # registers the architecture
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({{ name }})
tokenizer = AutoTokenizer.from_pretrained({{ name }})
```
{% endif %}

The licence is that of the dense model{{ " (`" + resolved.license + "`)" if resolved.get("license") else "" }}; its
files are here too, if it had any.
"""
ASK = """\
```python
{first}from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained({name})
processor = AutoProcessor.from_pretrained({name})
content = [{{"type": "image", "path": "picture.jpg"}}, {{"type": "text", "text": "What is it?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
print(processor.decode(model.generate(**inputs, max_new_tokens=32)[0], skip_special_tokens=True))
```
"""
METADATA = ("base_model", "license", "license_name", "license_link")
"""Of the card, what `moesaic.yaml` says of the dense model."""


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What the card says beside the conversion's metrics."""

    architecture: str
    selection: str
    takes_pictures: bool
    gguf: bool
    """Whether it can be written as GGUF."""
    flags: dict[str, str]
    """What an engine's command needs in addition."""


def write_card(metrics: ConversionResult, resolved: Json, facts: CardFacts, folder: Path) -> None:
    """Write `README.md` into a finished conversion or export; `resolved` is what `moesaic.yaml` says."""
    name = Path(metrics.output).name
    metadata: Json = {
        "library_name": "transformers" if metrics.engines else "moesaic",
        "pipeline_tag": "image-text-to-text" if facts.takes_pictures else "text-generation",
    }
    metadata |= {name: resolved[name] for name in METADATA if resolved.get(name)}
    metadata["tags"] = ["mixture-of-experts", "moesaic"]
    template = Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(CARD)
    text = template.render(
        m=metrics, c=resolved["config"], model=resolved["model"], name=in_python(name), gguf=facts.gguf,
        to_gguf=command("moesaic", "export", here(name), f"{here(name)}.gguf", "--format", "gguf"),
        serve_gguf=command("llama-server", "-m", f"{here(name)}/model.gguf"),
        engines=metrics.engines, commands=commands(name), flags=facts.flags, architecture=facts.architecture,
        resolved=resolved, selection=facts.selection, takes_pictures=facts.takes_pictures,
        errors={} if metrics.changes else {name_of(k): v for k, v in mean_errors(metrics.layers).items()},
        ask_in_python=ask_in_python(name, ours=not metrics.engines),
        bundled="the bundled pictures and text" if facts.takes_pictures else "the bundled text",
        share=share(metrics.ffn_active),
        metadata=yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True),
    )  # fmt: skip
    (folder / "README.md").write_text(text, encoding="utf-8")


def ask_in_python(folder: str, ours: bool) -> str:
    """Write what asks a vision-language model in a folder about a picture, as a block of Python.

    Args:
        folder: the model's.
        ours: whether it is in moesaic's own format, which is registered first.
    """
    first = "import moesaic  # registers the architecture\n" if ours else ""
    return ASK.format(first=first, name=in_python(folder))


def commands(folder: str) -> dict[str, str]:
    """Write what runs a model in a folder, by engine, as it can be pasted into a shell."""
    folder = here(folder)
    code = f'from transformers import pipeline; print(pipeline("text-generation", {in_python(folder)})("The first"))'
    return {
        "transformers": command("python", "-c", code),
        "vllm": command("vllm", "serve", folder),
        "sglang": command("python", "-m", "sglang.launch_server", "--model-path", folder),
        "mlx": command("python", "-m", "mlx_lm", "generate", "--model", folder) + ' --prompt "The first"',
    }


def in_python(name: str) -> str:
    """Write a name as text between double quotes, in Python."""
    return json.dumps(name, ensure_ascii=False)

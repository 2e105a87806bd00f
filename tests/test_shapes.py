"""Proposed shapes are what `convert` makes of them, in size, and are counted right."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from conftest import QUICK
from moesaic import InputError, convert, plans
from moesaic.cli import app
from moesaic.conversion.plans import disjoint_shapes, specialist_shapes


@given(
    active=st.sampled_from([0.25, 0.5, 0.75]),
    memory=st.sampled_from([1, 2, 4]),
    size=st.sampled_from([768, 4864, 11008]),
)
def test_shapes_are_near_the_budget_and_fit_the_memory(active, memory, size):
    found = [*specialist_shapes(active, memory, size), *disjoint_shapes(active, size)]
    assert {partition for partition, _ in found} == {"specialists", "coactivation"}
    for partition, plan in found:
        assert plan.ffn_active(size) == pytest.approx(active, abs=0.13)
        assert plan.memory_factor(size) <= (memory if partition == "specialists" else 1) + 1e-6


def test_a_width_for_k_quants_is_among_them_where_there_is_one():
    widths = {plan.width for _, plan in specialist_shapes(0.5, 1.0, 4864)}
    assert any(width % 256 == 0 for width in widths)
    assert {plan.width for _, plan in disjoint_shapes(0.5, 4864)} >= {256, 128}


def test_convert_makes_what_was_proposed(folders, tmp_path):
    proposed = plans(str(folders("qwen2"))).choices
    assert {c.partition for c in proposed} == {"specialists", "coactivation"}
    for number, c in enumerate([proposed[0], proposed[1], proposed[-1]]):
        settings = {"partition": c.partition, "plan": c.plan, "expert_width": c.expert_width}
        metrics = convert(folders("qwen2"), tmp_path / str(number), QUICK.model_copy(update=settings))
        for name in ("plan", "expert_width", "ffn_active", "memory_factor", "format"):
            assert getattr(metrics, name) == getattr(c, name)
        # a stock architecture has the head apart, moesaic's own format counts it where it is
        assert metrics.total_parameters == c.total_parameters
        assert metrics.active_parameters == c.active_parameters
        assert 1 < c.decode_limit < c.prefill_limit


def test_engines_follow_the_family(folders):
    [first, *_] = plans(str(folders("gemma3"))).choices
    assert (first.format, first.gguf) == ("moesaic", [])
    assert "no stock" in first.format_reason
    [first, *_] = plans(str(folders("olmo2"))).choices
    assert (first.format, first.engines, first.gguf) == ("flex_olmo", ["transformers", "vllm"], [])


def test_from_the_command_line(folders):
    run = CliRunner().invoke
    result = run(app, ["plan", str(folders("llama")), "--active", "0.25", "--memory-factor", "2", "--json"])
    assert json.loads(result.stdout)["choices"]
    with pytest.raises(InputError, match="above 0 and at most 1"):
        plans("tiny", active=1.5)
    with pytest.raises(InputError, match="no model 'nothing'"):
        plans("nothing")


def test_too_wide_a_specialist_is_refused(folders, tmp_path):
    config = QUICK.model_copy(update={"partition": "specialists", "plan": "S1A1E4", "expert_width": 64})
    with pytest.raises(InputError, match="runs 128 neurons, the FFN has 96"):
        convert(folders("llama"), tmp_path / "out", config)

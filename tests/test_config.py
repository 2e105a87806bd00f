import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from moesaic import ConvertConfig, InputError, Plan
from moesaic.partition.cmoe import CMoE
from moesaic.plan import FEWEST, disjoint_plan, parse_plan, specialists_plan


def test_plan_reads_and_writes():
    plan = parse_plan("S3A3E8", 4864)
    assert (plan.shared, plan.num_experts_per_tok, plan.groups, plan.width) == (3, 3, 8, 608)
    assert str(plan) == "S3A3E8"
    assert plan.ffn_active(4864) == 0.75
    assert plan.num_experts == 5
    assert plan.as_static() == Plan(6, 0, 8, 608)
    assert plan.as_static().num_experts == 0


@pytest.mark.parametrize(
    ("text", "width", "says"),
    [
        ("S3A3", None, "not of the form"),
        ("S3A3E5", None, "runs 6 of 5"),
        ("S0A0E8", None, "runs 0 of 8"),
        ("S3A3E7", None, "nearest count that does is 8"),
        ("S3A3E8", 100, "drop --expert-width"),
        ("S3A3E8", 256, "write E19"),
    ],
)
def test_bad_plans_say_the_way_out(text, width, says):
    with pytest.raises(InputError, match=says):
        parse_plan(text, 4864, width)


@given(active=st.floats(0.1, 1.0), size=st.sampled_from([96, 768, 2048, 4864, 8960, 11008, 14336]))
def test_chosen_plan_is_near_the_wish(active, size):
    plan = disjoint_plan(active, size)
    assert plan.groups * plan.width == size
    assert plan.shared + plan.num_experts_per_tok <= plan.groups
    assert abs(plan.ffn_active(size) - active) <= 0.5 * plan.width / size + 1e-9


@given(active=st.floats(0.05, 0.95), factor=st.floats(1, 8), size=st.sampled_from([768, 4864, 8960]))
def test_specialists_stay_within_memory(active, factor, size):
    plan = specialists_plan(active, factor, size)
    assert plan.num_experts_per_tok == 1
    assert plan.shared >= 1
    assert plan.num_experts >= FEWEST
    assert plan.memory_factor(size) <= factor + 1e-6
    assert plan.memory_factor(size) + plan.width / size > factor - 1e-6
    assert abs(plan.ffn_active(size) - active) <= 0.03


@pytest.mark.parametrize(
    ("active", "factor", "plan"),
    [(0.25, 1, "S1A1E8"), (0.25, 4, "S1A1E32"), (0.5, 1, "S1A1E4"), (0.5, 2, "S1A1E8"), (0.75, 1, "S5A1E8")],
)
def test_specialists_are_half_shared_where_memory_allows(active, factor, plan):
    assert str(specialists_plan(active, factor, 4864)) == plan


def test_impossible_wishes():
    with pytest.raises(InputError, match="above 0 and at most 1"):
        disjoint_plan(1.5, 768)
    with pytest.raises(InputError, match="nearest that does is 256"):
        disjoint_plan(0.5, 768, expert_width=250)
    with pytest.raises(InputError, match="leaves no room for specialists"):
        specialists_plan(0.75, 0.75, 768)


def test_methods_may_be_given_as_objects():
    assert yaml.safe_load(ConvertConfig(partition=CMoE(top_k=20)).to_yaml())["partition"] == "cmoe:top_k=20"
    assert ConvertConfig(partition=CMoE()).to_yaml() == ConvertConfig(partition="cmoe").to_yaml()

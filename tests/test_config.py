import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic import ConvertConfig, InputError, Plan
from moesaic.config import FEWEST, disjoint_plan, parse_plan, specialists_plan
from moesaic.partition.cmoe import CMoE


def test_plan_reads_and_writes():
    plan = parse_plan("S3A3E8", 4864)
    assert (plan.shared, plan.active, plan.groups, plan.width) == (3, 3, 8, 608)
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
    assert plan.shared + plan.active <= plan.groups
    assert abs(plan.ffn_active(size) - active) <= 0.5 * plan.width / size + 1e-9


@given(active=st.floats(0.05, 0.5), factor=st.floats(1, 8), size=st.sampled_from([768, 4864, 8960]))
def test_specialists_stay_within_memory(active, factor, size):
    plan = specialists_plan(active, factor, size)
    assert plan.memory_factor(size) <= factor + 1e-6
    assert active - 0.01 - 1 / size <= plan.ffn_active(size) <= active + 1 / size
    assert plan.num_experts == int(factor * size / plan.width + 1e-6) >= int(factor / active)
    assert plan.active == 1


@given(active=st.floats(0.51, 0.95), size=st.sampled_from([768, 4864, 8960]))
def test_where_two_specialists_do_not_fit_a_part_is_shared(active, size):
    plan = specialists_plan(active, 1.0, size)
    assert plan.shared > 0
    assert plan.num_experts == FEWEST
    assert plan.memory_factor(size) <= 1
    assert abs(plan.ffn_active(size) - active) <= 0.03


def test_impossible_wishes():
    with pytest.raises(InputError, match="above 0 and at most 1"):
        disjoint_plan(1.5, 768)
    with pytest.raises(InputError, match="nearest that does is 256"):
        disjoint_plan(0.5, 768, expert_width=250)
    with pytest.raises(InputError, match="leaves no room for specialists"):
        specialists_plan(0.75, 0.75, 768)


def test_methods_may_be_given_as_objects():
    config = ConvertConfig(partition=CMoE(top_k=20))
    assert config.partition == "cmoe:top_k=20"
    assert ConvertConfig(partition=CMoE()).partition == "cmoe"

"""The expert store: policies, replay, and the store against the model without it."""

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic import InputError
from moesaic.registry import build, names
from moesaic.store.policies.base import CacheSize, ExpertKey
from moesaic.store.policies.look_ahead import LookAhead
from moesaic.store.replay import LayerStep, replay
from moesaic.store.routes import layer_steps
from moesaic.store.synthetic import Routes

POLICIES = [build("cache", name) for name in names("cache")]
LAYERS, EXPERTS = 2, 3

steps = st.lists(st.sets(st.integers(0, EXPERTS - 1), min_size=1, max_size=2), min_size=1, max_size=9)


def trace_of(sets):
    """Layer steps in the order of layers."""
    return [LayerStep(number % LAYERS, tuple(sorted(chosen))) for number, chosen in enumerate(sets)]


def most_hits(trace, capacity):
    """The hits of the best choice of victims, by trying all."""

    def best(number, resident):
        if number == len(trace):
            return 0
        needed = {ExpertKey(trace[number].layer, e) for e in trace[number].experts}
        hits = len(needed & resident)
        kept = [set(k) for n in range(capacity - len(needed) + 1)
                for k in itertools.combinations(resident - needed, n)]  # fmt: skip
        return hits + max(best(number + 1, frozenset(needed | keep)) for keep in kept)

    return best(0, frozenset())


@settings(max_examples=40, deadline=None)
@given(steps, st.integers(2, 5))
def test_belady_has_the_most_hits_that_are_possible(sets, capacity):
    trace, size = trace_of(sets), CacheSize(capacity, LAYERS, EXPERTS)
    assert replay(trace, build("cache", "belady"), size).hits == most_hits(trace, capacity)


@settings(max_examples=60, deadline=None)
@given(steps, st.integers(1, 7), st.sampled_from(POLICIES), st.integers(0, 5))
def test_replay_counts_each_use_once_and_no_policy_beats_belady(sets, capacity, policy, depth):
    trace, size = trace_of(sets), CacheSize(capacity, LAYERS, EXPERTS)
    found = replay(trace, policy, size, depth)
    assert found.hits + found.misses == sum(len(step.experts) for step in trace)
    assert found.misses >= len({(s.layer, e) for s in trace for e in s.experts})
    if capacity >= max(len(step.experts) for step in trace):
        assert found.hits <= replay(trace, build("cache", "belady"), size).hits
    if capacity >= LAYERS * EXPERTS:
        assert found.misses == len({(s.layer, e) for s in trace for e in s.experts})


@settings(max_examples=40, deadline=None)
@given(steps, st.integers(2, 5))
def test_look_ahead_that_knows_all_is_belady(sets, capacity):
    trace, size = trace_of(sets), CacheSize(capacity, LAYERS, EXPERTS)
    whole = replay(trace, LookAhead(), size, look_ahead=len(trace))
    assert whole.hits == replay(trace, build("cache", "belady"), size).hits


def test_lru_keeps_nothing_below_one_token_and_look_ahead_does():
    """The cliff that BigMoeOnEdge measured on a device: 0 % for a global LRU that holds less than a token uses."""
    trace = [LayerStep(layer, (0, 1)) for _ in range(50) for layer in range(4)]
    size = CacheSize(6, 4, 8)
    assert replay(trace, build("cache", "lru"), size).hits == 0
    assert replay(trace, LookAhead(), size).hit_ratio > 0.6
    assert replay(trace, LookAhead(), size).hits == replay(trace, build("cache", "belady"), size).hits
    assert replay(trace, build("cache", "lru:per_layer=True"), CacheSize(8, 4, 8)).hit_ratio == pytest.approx(0.98)


def test_by_hand():
    trace = [LayerStep(0, (e,)) for e in (0, 1, 2, 0, 1, 3, 0)]
    size = CacheSize(2, 1, 4)
    assert replay(trace, build("cache", "lru"), size).hits == 0
    assert replay(trace, build("cache", "belady"), size).hits == 2
    assert replay([LayerStep(0, (e,)) for e in (0, 0, 1, 2, 0)], build("cache", "lfu"), size).hits == 2
    assert replay([LayerStep(0, (e,)) for e in (0, 0, 1, 2, 0)], build("cache", "static:learn=2"), size).hits == 2


def test_a_step_that_needs_more_than_fits_goes_through_one_place():
    assert replay([LayerStep(0, (0, 1, 2))] * 2, build("cache", "lru"), CacheSize(1, 1, 3)).misses >= 5


def test_what_has_run_may_leave_where_few_are_in_flight():
    """A step that fills the cache pushes all others out, unless its own experts take each other's place."""
    trace = [LayerStep(layer, (0, 1, 2)) for _ in range(20) for layer in range(4)]
    size, belady = CacheSize(4, 4, 3), build("cache", "belady")
    found = {n: replay(trace, belady, size, in_flight=n) for n in (None, 3, 2, 1)}
    assert found[None].hits == found[3].hits <= found[2].hits < found[1].hits
    assert {f.hits + f.misses for f in found.values()} == {240}


@pytest.mark.parametrize("capacity", [0, -1])
def test_a_fast_tier_of_nothing_is_refused(capacity):
    with pytest.raises(InputError, match="give room for one"):
        replay([LayerStep(0, (0,))], build("cache", "lru"), CacheSize(capacity, 1, 1))


def test_a_layer_without_room_is_refused():
    with pytest.raises(InputError, match="each of the 4 layers"):
        build("cache", "lru:per_layer=True").cache(CacheSize(3, 4, 8))


def test_a_trace_of_another_model_is_refused():
    with pytest.raises(InputError, match="2 layers of 3 experts"):
        replay([LayerStep(2, (0,))], build("cache", "lru"), CacheSize(2, 2, 3))


def test_expected_use_is_the_order_of_layers_and_then_the_share_of_passes():
    cache = LookAhead(lately=0.5, longer=0.5).cache(CacheSize(4, 3, 8))
    for layer in (0, 1, 2, 0):
        cache.begin(layer)
        key = ExpertKey(layer, 0)
        if key not in cache.resident:
            cache.admit(key)
        cache.use(key)
    # layer 0 has just run: layer 1 comes next, layer 2 then, layer 0 after a whole cycle
    assert cache.expected(np.array([1, 2, 0]), np.array([0, 0, 0])) == pytest.approx([1, 2, 3])
    assert cache.expected(np.array([1]), np.array([7])) == math.inf
    cache.begin(1)  # does without its expert: of two passes, of which the last counts double, a third used it
    assert cache.expected(np.array([1]), np.array([0])) == pytest.approx(3 + 3 * (3 - 1))


def test_look_ahead_takes_the_victim_that_a_scan_of_all_takes():
    """`max over resident, not busy, nothing known: expected`, the one used longest ago among equals."""
    generator, size = random.Random(1), CacheSize(12, 3, 8)
    cache = LookAhead().cache(size)
    for number in range(400):
        cache.begin(number % 3)
        for expert in sorted(generator.sample(range(8), 3)):
            key = ExpertKey(number % 3, expert)
            if key not in cache.resident:
                if cache.full(key):
                    busy = set(generator.sample(list(cache.resident), generator.randrange(12)))
                    known = {k: float(generator.randrange(9)) for k in cache.resident if generator.random() < 0.6}
                    future = lambda k, known=known: known.get(k, math.inf)  # noqa: E731
                    able = [k for k in cache.resident if k not in busy]
                    expected = {k: cache.expected(*np.array([k]).T)[0] for k in able}
                    unknown = [k for k in able if k not in known]
                    by_known = max(sorted(able, key=expected.__getitem__, reverse=True), key=future)
                    wanted = max(unknown, key=expected.__getitem__) if unknown else by_known
                    assert cache.victim(key, busy, future) == wanted
                    cache.evict(wanted)
                cache.admit(key)
            if generator.random() < 0.8:  # what comes early may not be used
                cache.use(key)
    assert cache.victim(ExpertKey(0, 0), set(cache.resident)) is None


def drawn(layers, experts, used, tokens):
    """Routes that repeat as those of real models do."""
    return layer_steps(Routes(num_layers=layers, num_experts=experts, experts_per_token=used).request(tokens))


@pytest.mark.parametrize("share", [0.05, 0.1, 0.2, 0.3, 0.5, 0.7])
def test_look_ahead_never_loses_to_lru_and_gains_by_what_it_knows(share):
    trace, size = drawn(6, 32, 3, 120), CacheSize(round(share * 6 * 32), 6, 32)
    lru, belady = (replay(trace, build("cache", name), size).hit_ratio for name in ("lru", "belady"))
    hits = [replay(trace, LookAhead(), size, depth).hit_ratio for depth in (0, 6, 24)]
    assert hits[0] >= lru - 0.01
    assert hits[0] <= hits[1] + 0.01 <= hits[2] + 0.02
    if share <= 0.3:  # with more room it takes more than four tokens to tell who is needed last
        assert hits[2] >= lru + 0.6 * (belady - lru)
    if size.capacity <= 6 * 3 - 3:  # less than a token uses
        assert lru == 0
        assert hits[0] > 0.1

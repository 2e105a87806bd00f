"""Route traces: written by inspect, read back, BigMoeOnEdge's form, traffic, the clock, prefill in closed form."""

import gzip
import itertools
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moesaic
from conftest import small_model
from moesaic import InputError
from moesaic.evaluation.routes import trace_request
from moesaic.moe.adaptive import moe_blocks_of
from moesaic.registry import build
from moesaic.store import pipeline
from moesaic.store.hits import cache_hits
from moesaic.store.policies.base import CacheSize
from moesaic.store.replay import KnownSteps, LayerStep, replay, run_step
from moesaic.store.routes import Pass, Route, RouteTrace, layer_steps
from moesaic.store.synthetic import Routes
from moesaic.store.timing import Link, StepTimes, predict_time
from moesaic.store.traces import read_trace, write_trace
from moesaic.store.traffic import poisson, together

ROOT = Path(__file__).parent.parent
OURS = """\
# moesaic route trace 1
# {"model": "small", "num_layers": 2, "num_experts": 8, "expert_bytes": 64}
request,step,phase,token,layer,experts,weights
0,0,prefill,0,0,3;1,0.6;0.4
0,0,prefill,1,0,3;7,0.5;0.5
0,0,prefill,0,1,2;4,0.9;0.1
0,0,prefill,1,1,2;5,0.8;0.2
0,1,decode,2,0,0;3,0.7;0.3
0,1,decode,2,1,4,1
1,0,prefill,0,0,6;1,0.6;0.4
1,0,prefill,0,1,,
"""
# The form of BigMoeOnEdge's --route-trace (Apache-2.0, docs/telemetry.md), with numbers of our own: layer 0 is dense,
# the last layer runs the prompt's last token only, a routing was dropped.
OTHERS = """\
# route_trace v1
# model=/models/some.gguf arch=qwen3moe n_layer=3 n_expert=16 n_expert_used=2
# layer=1 expert_bytes=4096 dense_bytes=100
turn,phase,step,layer,slot,expert,weight,residency,expert_bytes,dropped
0,0,0,1,0,9,0.6,0,4096,0
0,0,0,1,1,2,0.4,0,4096,0
0,0,1,1,1,9,0.3,0,0,0
0,0,1,1,0,5,0.7,0,4096,0
0,0,1,2,0,1,nan,0,4096,0
0,0,1,2,1,3,nan,0,4096,0
0,1,2,1,0,9,0.9,1,0,0
0,1,2,1,1,4,0.1,0,0,1
0,1,2,2,0,1,0.6,1,0,0
0,1,2,2,1,3,0.4,1,0,0
1,0,0,1,0,9,0.6,1,0,0
1,0,0,1,1,2,0.4,1,0,0
"""


@pytest.fixture(scope="module")
def mixture():
    return moesaic.load("tiny-moe", dtype=torch.float32)


@pytest.fixture
def written(tmp_path):
    def write(text, name="t.csv"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def test_our_form_by_hand(written):
    trace = read_trace(written(OURS))
    assert (trace.model, trace.num_layers, trace.num_experts, trace.expert_bytes) == ("small", 2, 8, 64)
    assert trace.routes[0] == Route(0, 0, "prefill", 0, 0, (3, 1), (0.6, 0.4))
    assert trace.steps("decode") == [LayerStep(0, (0, 3)), LayerStep(1, (4,))]
    assert trace.steps() == [
        LayerStep(0, (1, 3, 7), 2), LayerStep(1, (2, 4, 5), 2), *trace.steps("decode"), LayerStep(0, (1, 6))
    ]  # fmt: skip
    assert [[(p.phase, p.tokens) for p in request] for request in trace.passes()] == [
        [("prefill", 2), ("decode", 1)], [("prefill", 1)],
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz"])
def test_round_trip(written, tmp_path, name):
    trace = read_trace(written(OURS))
    write_trace(tmp_path / name, trace)
    assert read_trace(tmp_path / name) == trace
    if name.endswith("gz"):
        assert gzip.decompress((tmp_path / name).read_bytes()).decode() == OURS
    else:
        assert (tmp_path / name).read_text() == OURS


def test_form_of_bigmoeonedge(written):
    trace = read_trace(written(OTHERS))
    assert (trace.model, trace.num_layers, trace.num_experts, trace.expert_bytes) == ("qwen3moe", 2, 16, 4096)
    assert trace.steps() == [
        LayerStep(0, (2, 5, 9), 2), LayerStep(1, (1, 3)), LayerStep(0, (9,)), LayerStep(1, (1, 3)),
        LayerStep(0, (2, 9)),
    ]  # fmt: skip
    assert [r.experts for r in trace.routes if r.token == 1 and r.layer == 0] == [(5, 9)]
    assert [(r.request, r.step) for r in trace.routes] == [(0, 0)] * 3 + [(0, 1)] * 2 + [(1, 0)]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("0,0,prefill,1,0,3;7,0.5;0.5", "0,0,prefill,1,0,3;7", "line 5: 6 columns, expected 7"),
        ("0,0,prefill,1,0,3;7,", "0,0,prefill,1,0,3;x,", "line 5: an expert is 'x'"),
        ("0,0,prefill,1,0,3;7,", "0,0,prefill,1,0,3;-7,", "line 5: an expert is '-7'"),
        ("0,0,prefill,1,0,3;7,", "0,0,prefill,1,0,3;3,", "line 5: experts 3;3"),
        ("0,0,prefill,1,0,3;7,0.5;0.5", "0,0,prefill,1,0,3;7,0.5", "line 5: experts 3;7"),
        ("0,0,prefill,1,0,3;7,0.5;0.5", "0,0,prefill,1,0,3;7,a;b", "line 5: a weight is 'a'"),
        ("0,0,prefill,1,0", "0,0,warm,1,0", "line 5: phase is 'warm'"),
        ("0,0,prefill,1,0", "0,0,prefill,²,0", "line 5: token is '²'"),
        ("0,0,prefill,1,0,3;7", "0,0,prefill,1,0,3;8", "num_experts is 8, but number 8 is used"),
        ("0,0,prefill,1,0", "0,0,prefill,0,0", "not in the order"),
        ('"num_experts": 8', '"num_experts": "8"', "num_experts is 8, but number 7 is used"),
        ('{"model"', "{'model'", "line 2: the description of the model is no JSON"),
        ("request,", "requests,", "line 3: expected the header request,step"),
        ("1,,\n", "1,,", "line 11: it ends in the middle"),
    ],
)
def test_damage_is_refused_with_its_line(written, old, new, says):
    assert OURS.count(old) == 1
    with pytest.raises(InputError, match=says.replace("²", ".")):
        read_trace(written(OURS.replace(old, new)))


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("0,1,2,2,0,1,0.6,1,0,0", "0,1,2,2,0,1,0.6,1,0", "line 13: 9 columns, expected 10"),
        ("0,1,2,2,0,1,0.6", "0,2,2,2,0,1,0.6", "line 13: phase is '2'"),
        ("0,1,2,2,0,1,0.6", "0,1,-1,2,0,1,0.6", "line 13: step is '-1'"),
        ("0,1,2,2,0,1,0.6", "0,1,2,2,0,3,0.6", "turn 0, step 2, layer 2 has an expert twice"),
        ("0,1,2,2,0,1,0.6", "0,1,2,2,0,16,0.6", "num_experts is 16, but number 16 is used"),
        ("n_expert=16", "n_expert=many", "line 2: n_expert is 'many'"),
    ],
)
def test_damage_in_the_other_form(written, old, new, says):
    assert OTHERS.count(old) == 1
    with pytest.raises(InputError, match=says):
        read_trace(written(OTHERS.replace(old, new)))


def test_what_is_no_trace(tmp_path, written):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(OURS.encode())[:-12])
    for path, says in (
        (tmp_path / "nowhere", "No such file"), (tmp_path, "directory"), (tmp_path / "bytes", "is no text"),
        (tmp_path / "cut.gz", "cannot be read"), (written("", "empty"), "has no routes"),
        (written("a,b\n1,2\n", "other"), "line 1: expected the header"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=says):
            read_trace(path)


def test_a_trace_is_what_the_routers_decide(mixture):
    """Prefill and decode one by one equal one pass over the whole sequence."""
    model = mixture.model
    blocks = moe_blocks_of(model)
    prompt_L = torch.arange(5, 12)
    routes = trace_request(model, blocks, prompt_L, 4, request=3)
    text = model.generate(prompt_L[None], max_new_tokens=5, min_new_tokens=5, do_sample=False)[0, :-1]
    whole = trace_request(model, blocks, text, 0, request=3)
    assert [(r.token, r.layer, r.experts) for r in sorted(routes, key=lambda r: (r.layer, r.token))] == [
        (r.token, r.layer, r.experts) for r in whole
    ]
    assert [r.step for r in routes if r.layer == 0] == [0] * 7 + [1, 2, 3, 4]
    weights = torch.tensor([r.weights for r in sorted(routes, key=lambda r: (r.layer, r.token))])
    torch.testing.assert_close(weights, torch.tensor([r.weights for r in whole]), rtol=1e-3, atol=1e-4)


def test_inspect_trace_on_the_command_line(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("inspect", "tiny-moe", "--trace", "t.csv.gz", "--requests", "2", "--prompt", "8", "--new", "3", "--json")
    code, out, err = run(*words)
    assert code == 0, err
    found = json.loads(out)
    assert (found["requests"], found["tokens"], found["experts_per_token"], found["model"]) == (2, 22, 4.0, "tiny-moe")
    assert [cache["share"] for cache in found["caches"]] == [0.1, 0.2, 0.3, 0.5, 0.7]
    trace = read_trace(tmp_path / "t.csv.gz")
    assert (trace.model, trace.expert_bytes) == ("tiny-moe", found["expert_bytes"])
    assert len(trace.routes) == 22 * trace.num_layers
    before = (tmp_path / "t.csv.gz").read_bytes()
    assert run(*words)[0] == 0
    assert (tmp_path / "t.csv.gz").read_bytes() == before
    (tmp_path / "notes.txt").write_text("mine")
    for place, says in (
        ("notes.txt", "is no route trace"),
        ("no/t.csv", "there is no folder"),
        (".", "is a folder or"),
    ):
        code, out, err = run("inspect", "tiny-moe", "--trace", place)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert says in err
    os.mkfifo(tmp_path / "pipe")
    assert "is a folder or a device" in run("inspect", "tiny-moe", "--trace", "pipe")[2]
    (tmp_path / "pipe").unlink()
    for words, says in (
        ("tiny --trace a.csv", "is dense"), ("tiny-moe --trace a.csv --adaptive", "give one of them"),
        ("tiny-moe --requests 3", "--requests is for --trace"), ("tiny-moe --trace a.csv --tokens 9", "--tokens is"),
        ("tiny-moe --trace a.csv --new 99999", "more than the model's longest"),
        ("tiny-moe --trace a.csv --requests 0", "--requests is 0"), ("tiny-moe --trace a.csv --new -1", "--new is -1"),
    ):  # fmt: skip
        code, out, err = run("inspect", *words.split())
        assert (code, out) == (2, "")
        assert says in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "t.csv.gz"]


def test_a_link_to_a_trace_stays_one(tmp_path, mixture):
    (tmp_path / "link.csv").symlink_to(tmp_path / "there.csv")
    moesaic.inspect_routes(*mixture, tmp_path / "link.csv", requests=1, prompt=4, new=1)
    assert (tmp_path / "link.csv").is_symlink()
    assert read_trace(tmp_path / "there.csv").num_layers


def test_a_damaged_archive_is_refused(tmp_path, run):
    data = bytearray((ROOT / "tests" / "data" / "tiny-moe-routes.csv.gz").read_bytes())
    data[12:60] = bytes(byte ^ 0xFF for byte in data[12:60])
    (tmp_path / "bad.csv.gz").write_bytes(data)
    with pytest.raises(InputError, match="cannot be read as a route trace"):
        read_trace(tmp_path / "bad.csv.gz")
    code, _, err = run("inspect", "tiny-moe", "--trace", tmp_path / "bad.csv.gz")
    assert code == 2
    assert "is no route trace" in err


def passes(*sets):
    return [Pass("decode", 1, (LayerStep(0, tuple(sorted(s))),)) for s in sets]


def test_requests_together_by_hand():
    a, b, c = passes({0}, {1}, {2}), passes({5}, {1}), passes({7})
    joint = together([a, b, c], 2)
    assert [p.steps[0].experts for p in joint] == [(0, 5), (1,), (2, 7)]
    assert [p.tokens for p in joint] == [2, 2, 2]
    late = together([a, b, c], 2, [0.0, 1.5, 9.0])
    assert [p.steps[0].experts for p in late] == [(0,), (1,), (2, 5), (1,), (7,)]
    with pytest.raises(InputError, match="give one place"):
        together([a], 0)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=6), st.integers(1, 4), st.integers(0, 9))
def test_together_loses_no_pass(lengths, at_once, seed):
    requests = [passes(*[{n}] * length) for n, length in enumerate(lengths)]
    joint = together(requests, at_once, poisson(len(lengths), 0.5, seed))
    assert sum(p.tokens for p in joint) == sum(lengths)
    assert all(p.tokens <= at_once for p in joint)
    for n, length in enumerate(lengths):
        assert sum(n in p.steps[0].experts for p in joint) == length


def test_poisson_has_its_rate_and_its_seed():
    assert poisson(3, 0.5, 1) == poisson(3, 0.5, 1) != poisson(3, 0.5, 2)
    assert poisson(4_000, 0.5)[-1] == pytest.approx(8_000, rel=0.05)
    with pytest.raises(InputError, match="above 0"):
        poisson(1, 0)


def naive_time(trace, policy, size, times):
    """The clock in events: every load and every run is an interval that begins when all it waits for has ended."""
    cache, known = policy.cache(size), KnownSteps(trace, 0)
    begins, loads, runs, owed, last, at = [], [0.0], [0.0], 0.0, size.num_layers, 0.0
    for number, step in enumerate(trace):
        missing = len(run_step(cache, step, known.next_use, times.in_flight))
        at = runs[-1] + (times.each_pass if step.layer <= last else 0)
        begins.append(at)
        routed = at + times.layer
        owed += missing * times.foreseen if times.ahead else 0
        early = min(missing, math.floor(owed + 1e-9))
        owed -= early
        one = times.expert + times.token * step.tokens / len(step.experts)
        present = len(step.experts) - missing
        ends = [routed + one * (n + 1) for n in range(present)] if times.pipelined else []
        arrived = []
        for n in range(missing):
            first = number - times.ahead
            known_from = (begins[first] if first >= 0 else 0.0) if n < early else routed
            left = [ends[present + n - times.in_flight]] if times.in_flight and n >= times.in_flight else []
            loads.append(max([loads[-1], known_from, *left]) + times.load)
            arrived.append(loads[-1])
            if times.pipelined:
                ends.append(max([routed, *ends[-1:], arrived[-1]]) + one)
        end = ends[-1] if times.pipelined else max([routed, *arrived]) + one * len(step.experts)
        runs.append(end)
        last = step.layer
    return runs[-1]


part = st.sampled_from([0.0, 0.5, 1.0, 3.0])


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.sets(st.integers(0, 5), min_size=1, max_size=4), min_size=1, max_size=12), st.integers(1, 12),
    part, part, part, part, st.booleans(), st.integers(0, 3), st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([None, 1, 2]),
)  # fmt: skip
def test_time_equals_the_naive_clock(sets, capacity, load, expert, layer, each, pipelined, ahead, foreseen, flying):
    trace = [LayerStep(n % 2, tuple(sorted(chosen)), 1 + n % 3) for n, chosen in enumerate(sets)]
    times = StepTimes(
        load=load, expert=expert, layer=layer, token=0.25, each_pass=each, pipelined=pipelined, ahead=ahead,
        foreseen=foreseen, in_flight=flying if pipelined else None,
    )  # fmt: skip
    size = CacheSize(capacity, 2, 6)
    found = predict_time(trace, build("cache", "lru"), size, times)
    assert found.seconds == pytest.approx(naive_time(trace, build("cache", "lru"), size, times))
    assert (found.hits, found.misses) == (
        (plain := replay(trace, build("cache", "lru"), size, in_flight=times.in_flight)).hits, plain.misses
    )  # fmt: skip
    assert found.passes == (len(trace) + 1) // 2
    assert 0 <= found.waited <= found.seconds + 1e-9


def test_time_by_hand():
    trace = [LayerStep(0, (0, 1)), LayerStep(1, (0, 1))] * 2
    size, lru = CacheSize(4, 2, 2), build("cache", "lru")
    slow = predict_time(trace, lru, size, StepTimes(load=10, expert=1, layer=2, pipelined=False))
    assert (slow.seconds, slow.waited) == (4 * (2 + 2) + 4 * 10, 40)
    pipelined = predict_time(trace, lru, size, StepTimes(load=10, expert=1, layer=2))
    assert pipelined.seconds == 2 * (2 + 20 + 1) + 2 * (2 + 2)  # the first expert runs while the second loads
    ahead = predict_time(trace, lru, size, StepTimes(load=10, expert=1, layer=2, ahead=1))
    assert ahead.seconds == 41 + 2 * 4  # the link never rests: four loads, then one expert, then two layers
    assert Link(1e9, 0.001).seconds(500_000_000) == pytest.approx(0.501)
    with pytest.raises(InputError, match="negative time"):
        StepTimes(load=-1, expert=1)
    with pytest.raises(InputError, match="0 experts in flight"):
        StepTimes(load=1, expert=1, in_flight=0)


def test_expected_active_is_the_mean_of_draws():
    """E (1 - (1 - k/E)^m), against routing at random: DeepSeek-V2's 160 experts, 6 a token."""
    generator = torch.Generator().manual_seed(0)
    for tokens in (1, 8, 64):
        drawn = [torch.rand(tokens, 160, generator=generator).topk(6).indices.unique().numel() for _ in range(200)]
        assert pipeline.expected_active(160, 6, tokens) == pytest.approx(sum(drawn) / 200, rel=0.03)
    assert pipeline.expected_active(160, 6, 1) == pytest.approx(6)


@pytest.mark.parametrize(("move", "compute", "cost"), [(4.0, 10.0, 0.1), (10.0, 4.0, 0.7), (3.0, 3.0, 0.02), (1, 9, 5)])
def test_best_number_of_stages_is_the_best_of_all(move, compute, cost):
    every = [pipeline.prefill_time(move, compute, n, cost) for n in range(1, 65)]
    chosen = pipeline.best_stages(move, compute, cost, 64)
    assert every[chosen - 1] == pytest.approx(min(every))
    assert abs(chosen - max(1.0, math.sqrt(min(move, compute) / cost))) <= 1  # N* = sqrt(C / kappa)
    assert pipeline.prefill_time(move, compute) == move + compute
    assert pipeline.best_stages(move, compute, cost, 2) <= 2


def test_figures_of_eps_moe():
    """Prefill of DeepSeek-V2, 1K input: N = 5 gives 21.8 % more throughput than no pipeline.

    With N* = 5 the cost of a stage is C / 25. What moves is then 28 % of a layer's time without a pipeline. 100K to
    120K tokens/s and TTFT -24.3 % (Mixtral) and -30.5 % (DBRX) are within what five stages can give; 52.4 % at most,
    which the choice of kernels is part of, is within the limit of 2 that all overlap has.
    """
    gain = lambda share: 1 / (pipeline.prefill_time(share, 1 - share, 5, share / 25))  # noqa: E731
    share = next(n / 1000 for n in range(1, 500) if gain(n / 1000) >= 1.218)
    assert share == pytest.approx(0.28, abs=0.02)
    assert pipeline.best_stages(share, 1 - share, share / 25, 160) == 5
    assert gain(0.5) > 1 / (1 - 0.305) > 1 / (1 - 0.243) > gain(share) > 1.2
    assert 1.524 < 1 / pipeline.prefill_time(0.5, 0.5, 1_000) < 2
    assert pipeline.all_reduce_volume(8.0, 8) == 14.0


def test_load_of_few_tokens_needs_few_stages():
    """The number of stages is chosen by the size of the load: what moves grows with the experts that run."""

    def stages(tokens):
        active = pipeline.expected_active(64, 4, tokens)
        return pipeline.best_stages(active * 1e-3, tokens * 4 * 1e-4, 2e-3, round(active))

    assert [stages(n) for n in (1, 8, 64, 512)] == sorted(stages(n) for n in (1, 8, 64, 512))
    assert stages(1) == 1 < stages(512)


def test_drawn_routes_repeat_as_measured_ones():
    """BigMoeOnEdge's Qwen3-30B: neighbours share 38.0 % of experts, tokens eight apart 26.7 %, hot six carry 37.6 %."""
    request = Routes(num_layers=8, num_experts=128, experts_per_token=6).request(128)
    assert request == Routes(num_layers=8, num_experts=128, experts_per_token=6).request(128)
    sets = [[set(p.steps[layer].experts) for p in request] for layer in range(8)]

    def shared(lag):
        return sum(len(s[t] & s[t - lag]) / 6 for s in sets for t in range(lag, 128)) / (8 * (128 - lag))

    assert shared(1) == pytest.approx(0.38, abs=0.03)
    assert shared(8) == pytest.approx(0.28, abs=0.03)
    steps, size = layer_steps(request), CacheSize(7 * 6, 8, 128)
    assert replay(steps, build("cache", "lru"), size).hit_ratio == 0  # all layers but one: the cliff
    assert replay(steps, build("cache", "belady"), size).hit_ratio > 0.25


def test_committed_trace_has_its_cliff():
    trace = read_trace(ROOT / "tests" / "data" / "tiny-moe-routes.csv.gz")
    assert (trace.model, trace.num_layers, trace.num_experts, len(trace.routes)) == ("tiny-moe", 6, 16, 4 * 64 * 6)
    steps = trace.steps("decode")
    cycle = sum(len(step.experts) for step in steps[: trace.num_layers])
    assert cycle == 4 * trace.num_layers
    below, above = (CacheSize(n, trace.num_layers, trace.num_experts) for n in (cycle - 4, 2 * cycle))
    assert replay(steps, build("cache", "lru"), below).hits == 0
    assert replay(steps, build("cache", "look-ahead"), below).hit_ratio > 0.3
    lru, ahead, best = (replay(steps, build("cache", name), above).hits for name in ("lru", "look-ahead", "belady"))
    assert lru < ahead < best


def test_hits_are_those_of_a_replay_and_grow_with_the_memory():
    trace = read_trace(ROOT / "tests" / "data" / "tiny-moe-routes.csv.gz")
    told = []
    found = cache_hits(trace, lambda done, count, _: told.append((done, count)))
    assert [(one.share, one.capacity) for one in found] == [(0.1, 9), (0.2, 19), (0.3, 28), (0.5, 48), (0.7, 67)]
    assert told == [(n, 15) for n in range(1, 16)]
    size = CacheSize(28, 6, 16)
    for name, ratio in found[2].hit_ratio.items():
        assert ratio == replay(trace.steps("decode"), build("cache", name), size, in_flight=2).hit_ratio
    for less, more in itertools.pairwise(found):
        assert all(less.hit_ratio[name] <= more.hit_ratio[name] for name in less.hit_ratio)
    assert all(max(one.hit_ratio.values()) == one.hit_ratio["belady"] for one in found)
    assert trace.expert_bytes
    misses = 24 * (1 - found[2].hit_ratio["look-ahead"])
    assert found[2].bytes_read_per_token == round(misses * trace.expert_bytes)
    prompts = [route for route in trace.routes if route.phase == "prefill"]
    assert cache_hits(replace(trace, routes=prompts)) == []


def test_python_writes_a_trace(tmp_path, mixture):
    found = moesaic.inspect_routes(*mixture, tmp_path / "t.csv", requests=1, prompt=4, new=0)
    assert (found.tokens, found.rule, "rule" in found.to_dict()) == (4, None, False)
    assert isinstance(read_trace(tmp_path / "t.csv"), RouteTrace)
    with pytest.raises(InputError, match="is dense"):
        moesaic.inspect_routes(small_model("llama"), mixture.tokenizer, tmp_path / "d.csv", prompt=4, new=0)

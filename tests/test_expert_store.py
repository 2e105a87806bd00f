"""The expert store against the model without it: the same text, whatever the memory, policy and family."""

import gc
import json
import math
import re
import shutil
import threading
import time
import weakref
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save_file

import moesaic
from moesaic import InputError, StoreOptions, find_blocks
from moesaic.checkpoint.sources import resolve
from moesaic.errors import WorkError
from moesaic.models.router_scores import RouterScores
from moesaic.models.tokenizer import load_tokenizer
from moesaic.registry import build, names
from moesaic.routing.selection.base import Ranking
from moesaic.store.bias import prefer
from moesaic.store.memory import check_expert_memory, expert_memory_bytes, slots_within
from moesaic.store.opening import give_store, slow_tier
from moesaic.store.policies.base import ExpertKey
from moesaic.store.replay import LayerStep, replay
from moesaic.store.source import (
    DiskSource,
    ExpertSource,
    ExpertWeights,
    HostSource,
    Place,
    ThrottledSource,
    tensor_offsets,
)
from moesaic.store.store import ExpertStore
from test_moe_block import STOCK
from test_pruning import whole

FAMILIES = [name for name in STOCK if name != "llama4"]  # its experts are not called through the interface
PROMPT = torch.tensor([[5, 9, 33, 2, 41, 17, 8, 60]])


def continued(model, prompt=PROMPT, new=12):
    with torch.inference_mode():
        return model.generate(prompt, max_new_tokens=new, do_sample=False, pad_token_id=0)


def saved(name, folder):
    """A stock model of a family in a folder, with a tokenizer."""
    model = whole(name)
    model.save_pretrained(folder)
    load_tokenizer(resolve("tiny")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stock_folders(tmp_path_factory):
    made = {}

    def folder(name):
        if name not in made:
            made[name] = saved(name, tmp_path_factory.mktemp(name))
        return made[name]

    return folder


def least_memory(model):
    """What holds one token's experts of one layer."""
    blocks = find_blocks(model)
    return f"{math.ceil(1000 * blocks[0].num_experts_per_tok / (len(blocks) * blocks[0].num_experts)) / 10}%"


def check_same(folder, store, **more):
    """Texts, logits and all weights but the experts' are those of the model with all experts in memory."""
    plain, _ = moesaic.load(folder, **more)
    stored, _ = moesaic.load(folder, store=store or StoreOptions(least_memory(plain)), **more)
    assert torch.equal(continued(plain), continued(stored))
    two = torch.cat([PROMPT, PROMPT.flip(1)])
    with torch.inference_mode():
        expected, found = (model(two).logits for model in (plain, stored))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    weights = dict(stored.named_parameters())
    for key, weight in plain.named_parameters():
        assert weights[key].is_meta or torch.equal(weight, weights[key]), key
        assert weights[key].dtype == weight.dtype
    assert sum(part.is_meta for part in weights.values()) == 2 * len(find_blocks(plain))
    buffers = dict(stored.named_buffers())
    for key, buffer in plain.named_buffers():
        assert buffers[key].dtype == buffer.dtype, key
        assert torch.equal(buffers[key], buffer), key
    stored.expert_store.close()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_text_is_the_same_in_the_smallest_memory(name, stock_folders):
    check_same(stock_folders(name), None)


ONLINE = [name for name in names("cache") if build("cache", name).online]


@pytest.mark.parametrize("memory", ["50%", "17%"])  # of 12 experts six, and the two that one token runs in a layer
@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("cache", [*ONLINE, "lfu:half_life=9", "static:learn=8", "lru:per_layer=True"])
def test_the_text_is_the_same_with_any_policy(cache, prefetch, memory, stock_folders):
    check_same(stock_folders("qwen3-moe"), StoreOptions(memory, cache, prefetch))


@pytest.mark.parametrize(
    ("name", "dtype"), [("mixtral", torch.bfloat16), ("deepseek-v3", torch.bfloat16), ("glm4-moe", torch.float16)]
)
def test_the_text_is_the_same_in_another_dtype(name, dtype, stock_folders):
    """Also where transformers keeps a part in float32, as the biases by which DeepSeek-V3 chooses experts."""
    check_same(stock_folders(name), StoreOptions("80%"), dtype=dtype)


@pytest.mark.parametrize("rule", ["top-p:p=0.5", "top-k:k=1", "threshold:threshold=0.2"])
def test_the_text_is_the_same_with_a_rule(rule, stock_folders):
    check_same(stock_folders("qwen3-moe"), StoreOptions("40%"), select=rule)


QUICK = {"tokens": 1_024, "window": 64, "held_out_tokens": 256, "partition": "coactivation"}
PLANS = {"moesaic": "S1A1E4", "glm4_moe": "S1A2E8", "mixtral": "S1A1E4", "qwen2_moe": "S4A2E8"}


@pytest.mark.parametrize("format", PLANS)
def test_the_text_of_a_converted_model_is_the_same(format, tmp_path):
    """Read from whatever the format has: experts scaled by powers of two, copies of the shared expert in each."""
    moesaic.convert(
        "tiny",
        tmp_path / "out",
        moesaic.ConvertConfig(**QUICK, plan=PLANS[format], format=format, router="linear:intercept=False"),
    )
    check_same(tmp_path / "out", StoreOptions("50%"))


def test_the_store_does_what_the_replay_says(stock_folders):
    for cache in ("lru", "look-ahead", "lfu", "lru:per_layer=True"):
        stored, _ = moesaic.load(stock_folders("qwen3-moe"), store=StoreOptions("40%", cache, prefetch=False))
        store = stored.expert_store
        fresh_store(stored)
        store = stored.expert_store
        store.trace = []
        continued(stored)
        trace = [LayerStep(layer, experts) for layer, experts in store.trace]
        found = replay(trace, build("cache", cache), store.size, in_flight=store.readers)
        assert (found.hits, found.misses) == (store.counts.hits, store.counts.misses)
        assert store.counts.bytes_read == found.misses * store.expert_bytes


def fresh_store(model, source=None, **more):
    """Give a model a store that has done nothing yet."""
    old = model.expert_store
    new = ExpertStore(source or old.source, old.like, old.size.capacity, old.policy, old.device)
    give_store(model, new, prefetch=False)


def test_a_store_may_be_made_in_inference_mode(tmp_path):
    moesaic.convert("tiny", tmp_path / "out", moesaic.ConvertConfig(**QUICK, plan="S1A2E8", format="glm4_moe"))
    with torch.inference_mode():
        stored, _ = moesaic.load(tmp_path / "out", store=StoreOptions("40%"))
        expected = continued(stored)
    assert torch.equal(continued(stored), expected)


def test_readers_at_once_see_the_same(stock_folders):
    plain, _ = moesaic.load(stock_folders("qwen3-moe"))
    stored, _ = moesaic.load(stock_folders("qwen3-moe"), store=StoreOptions("20%"))
    prompts = [torch.randint(0, 256, (1, 8), generator=torch.Generator().manual_seed(n)) for n in range(8)]
    expected = [continued(plain, prompt) for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda prompt: continued(stored, prompt), prompts))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert not any(entry.pins for entry in stored.expert_store.entries.values())


def test_a_file_that_is_cut_short_is_an_error_and_no_answer(stock_folders, tmp_path):
    stored, _ = moesaic.load(stock_folders("qwen3-moe"), store=StoreOptions("30%"))
    [weights] = stock_folders("qwen3-moe").glob("*.safetensors")
    short = tmp_path / weights.name
    short.write_bytes(weights.read_bytes()[: weights.stat().st_size // 8])

    def moved(matrix):
        return matrix._replace(parts=tuple(rows._replace(path=short) for rows in matrix.parts))

    places = stored.expert_store.source.places
    fresh_store(stored, DiskSource([[Place(moved(p.gate_up), moved(p.down)) for p in layer] for layer in places]))
    with pytest.raises(WorkError, match="ends within expert"):
        continued(stored, torch.randint(0, 256, (1, 64)))
    assert not any(entry.pins for entry in stored.expert_store.entries.values())


def test_threads_that_died_are_an_error_and_no_answer(stock_folders):
    stored, _ = moesaic.load(stock_folders("qwen3-moe"), store=StoreOptions("30%"))
    stored.expert_store._readers.close()
    with pytest.raises(WorkError, match="threads that read experts are gone"):
        continued(stored, torch.randint(0, 256, (1, 64)))
    stored.expert_store.close()
    with pytest.raises(WorkError, match="closed"):
        continued(stored)


@pytest.mark.parametrize("times", [1, 2])  # two are read at once
def test_a_read_that_fails_is_tried_again_next_time(times, stock_folders):
    stored, _ = moesaic.load(stock_folders("qwen3-moe"), store=StoreOptions("30%"))
    expected = continued(stored)

    class AwayAtFirst(ExpertSource):
        num_layers, num_experts, failed = stored.expert_store.size.num_layers, stored.expert_store.size.num_experts, 0

        def __init__(self, source):
            self.source = source

        def read(self, key, out):
            self.failed += 1
            if self.failed <= times:
                raise OSError("the disk is away")
            return self.source.read(key, out)

    fresh_store(stored, AwayAtFirst(DiskSource(stored.expert_store.source.places)))
    with pytest.raises(WorkError, match="the disk is away"):
        continued(stored)
    while not all(entry.task.done() for entry in stored.expert_store.entries.values()):
        time.sleep(0.01)
    assert torch.equal(continued(stored), expected)


def test_who_waits_for_room_hears_of_it_at_once(stock_folders, monkeypatch):
    class Slow(Future):
        def set_result(self, result):
            time.sleep(0.1)
            super().set_result(result)

    monkeypatch.setattr("moesaic.store.readers.Task", Slow)
    stored, _ = moesaic.load(stock_folders("qwen3-moe"), store=StoreOptions("100%"))
    old = stored.expert_store
    store = ExpertStore(old.source, old.like, 1, old.policy, old.device, readers=1)
    store.prefetch([ExpertKey(1, 0)])
    time.sleep(0.05)  # it has been read and not been said to be
    begin = time.monotonic()
    assert [expert.number for expert in store.visit(0, [2])] == [2]
    assert time.monotonic() - begin < 0.9
    store.close()


def test_what_is_read_early_counts_as_a_hit_and_what_is_not_wanted_is_given_up(stock_folders):
    stored, _ = moesaic.load(stock_folders("qwen3-moe"), store=StoreOptions("100%"))
    store = stored.expert_store
    slow = ThrottledSource(store.source, bytes_per_second=1e12, latency_seconds=0.05)
    store = ExpertStore(slow, store.like, store.size.capacity, store.policy, store.device, readers=1)
    store.prefetch([ExpertKey(0, e) for e in (0, 1, 2)])
    time.sleep(0.02)
    store.prefetch([ExpertKey(1, 0)])  # 0 is being read, 1 and 2 have not begun
    assert store.counts.cancelled == 2
    assert [expert.number for expert in store.visit(0, [0, 3])] == [0, 3]
    assert (store.counts.hits, store.counts.misses, store.counts.prefetched) == (1, 1, 4)


def test_a_model_that_goes_takes_its_threads_and_files_along(stock_folders):
    before = set(threading.enumerate())
    stored, _ = moesaic.load(stock_folders("qwen3-moe"), store=StoreOptions("50%"))
    continued(stored)
    assert len(set(threading.enumerate()) - before) == 2
    store = weakref.ref(stored.expert_store)
    del stored
    gc.collect()
    assert store() is None
    for thread in set(threading.enumerate()) - before:
        thread.join(5)
    assert not set(threading.enumerate()) - before


def test_host_memory_holds_the_experts_that_are_on_disk(stock_folders):
    stored, _ = moesaic.load(stock_folders("qwen3-moe"), store=StoreOptions("100%"))
    disk, like = stored.expert_store.source, stored.expert_store.like
    host = HostSource(disk, like, pinned=False)
    assert not host.is_pinned
    for key in (ExpertKey(0, 0), ExpertKey(1, 3)):
        theirs, ours = (ExpertWeights(*(torch.empty_like(part, device="cpu") for part in like)) for _ in "ab")
        assert disk.read(key, theirs) == host.read(key, ours)
        assert all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True))


def test_experts_of_a_gpu_stay_on_disk_where_host_memory_does_not_hold_them(stock_folders, monkeypatch, caplog):
    stored, _ = moesaic.load(stock_folders("qwen3-moe"), store=StoreOptions("100%"))
    disk, like = stored.expert_store.source, stored.expert_store.like
    monkeypatch.setattr("moesaic.store.opening.free_memory", lambda _: 1_000_000)
    assert slow_tier(disk, like, 800_001, torch.device("cuda")) is disk
    assert "0.0 GB of host memory are free: they are read from disk" in caplog.text
    assert slow_tier(disk, like, 800_001, torch.device("cpu")) is disk
    kept = []
    monkeypatch.setattr("moesaic.store.opening.HostSource", lambda *_, pinned: kept.append(pinned))
    slow_tier(disk, like, 800_000, torch.device("cuda"))
    assert kept == [True]


def test_a_file_that_is_written_to_while_it_is_used_is_no_wrong_answer(tmp_path):
    folder = shutil.copytree(resolve("tiny-moe"), tmp_path / "moe")
    stored, _ = moesaic.load(folder, store=StoreOptions("10%"))
    continued(stored)
    file = next(folder.glob("*.safetensors"))
    data = file.read_bytes()
    with file.open("r+b") as opened:
        opened.write(data)  # the same, but who could know
    with pytest.raises(WorkError, match="was written to while its experts were in use"):
        continued(stored)


@pytest.mark.parametrize("readers", [0, -1, "many", 1e9])
def test_readers_are_a_number_of_threads(readers):
    with pytest.raises(InputError, match="--readers is"):
        moesaic.load("tiny-moe", store=StoreOptions("30%", readers=readers))


def test_the_memory_that_an_error_names_is_enough():
    for size in (67_584, 1_234_567, 999):
        with pytest.raises(InputError) as found:
            slots_within(1, size, 96, 4, torch.device("cpu"))
        named = re.search(r"in a layer: (\S+MB), or (\S+%)", str(found.value))
        assert all(slots_within(given, size, 96, 4, torch.device("cpu")) >= 4 for given in named.groups())
    assert expert_memory_bytes("9" * 400, 100, torch.device("cpu")) == 100


def test_a_throttled_source_is_as_slow_as_it_says(stock_folders):
    stored, _ = moesaic.load(stock_folders("qwen3-moe"), store=StoreOptions("100%"))
    store = stored.expert_store
    slow = ThrottledSource(store.source, bytes_per_second=store.expert_bytes / 0.02)
    throttled = ExpertStore(slow, store.like, store.size.capacity, store.policy, store.device)
    begin = time.monotonic()
    assert len(list(throttled.visit(0, [0, 1, 2]))) == 3
    assert time.monotonic() - begin >= 0.06


def test_preferring_what_is_resident_by_hand():
    ranking = Ranking(torch.tensor([[3, 1, 0, 2]]), torch.tensor([[9.0, 5.0, 4.0, 1.0]]), torch.zeros(1, 4), False)
    resident = torch.tensor([True, False, True, False])
    assert prefer(ranking, resident, 0.0).tolist() == [[0, 1, 2, 3]]
    assert prefer(ranking, resident, 0.25).tolist() == [[0, 2, 1, 3]]  # 4 + 2 is above 5, 1 + 2 is not
    assert prefer(ranking, resident, 1.0).tolist() == [[0, 2, 3, 1]]


def test_a_bias_of_the_routers_own_is_kept():
    """Nothing resident: the order is the router's, of shares with its bias, and not of shares alone."""
    scores_TE = torch.tensor([[0.9, 0.8, 0.7]])
    found = RouterScores(lambda logits: logits, False, 1.0, torch.tensor([0.0, 0.3, 0.25]), own_only=False)
    shares, index = scores_TE.gather(1, torch.tensor([[1, 2, 0]])), torch.tensor([[1, 2, 0]])
    ranking = Ranking(*found.rank((scores_TE, scores_TE, scores_TE)), logarithmic=found.bias_E is None)
    torch.testing.assert_close(ranking.shares_TN, shares)
    assert torch.equal(ranking.index_TN, index)
    assert prefer(ranking, torch.zeros(3, dtype=torch.bool), 0.01).tolist() == [[0, 1, 2]]


def test_offsets_are_those_of_the_file_that_is_there(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2), "b": torch.zeros(3)}, file)
    before = tensor_offsets(file)
    save_file({"long name": torch.zeros(7), "b": torch.zeros(3)}, file)
    assert tensor_offsets(file).keys() == {"long name", "b"} != before.keys()


@pytest.mark.parametrize("name", ["qwen3-moe", "mixtral", "olmoe", "ours"])
def test_a_bias_of_nothing_changes_nothing_and_more_saves_reads(name, stock_folders, tmp_path):
    if name == "ours":
        folder = tmp_path / "ours"
        moesaic.convert("tiny", folder, moesaic.ConvertConfig(**QUICK, plan="S1A2E8", format="moesaic"))
    else:
        folder = stock_folders(name)
    misses = {}
    for bias in (0.0, 1e-9, 0.9):
        stored, _ = moesaic.load(folder, store=StoreOptions("60%", cache_bias=bias, prefetch=False))
        text = continued(stored, new=20)
        misses[bias] = stored.expert_store.counts.misses
        if bias == 0:
            expected = text
        elif bias < 0.1:
            assert torch.equal(text, expected)
    assert misses[0.9] < misses[0.0] == misses[1e-9]


@pytest.mark.parametrize(
    ("text", "size"),
    [("512MB", 512_000_000), ("0.5GiB", 2**29), ("2 kb", 2_000), ("30%", 300_000_000), ("100%", 10**9), ("7GB", 10**9),
     (123, 123)],
)  # fmt: skip
def test_memory_is_read_as_people_write_it(text, size):
    check_expert_memory(text)
    assert expert_memory_bytes(text, 10**9, torch.device("cpu")) == size


@pytest.mark.parametrize(("names", "cached"), [
    (("memory.max", "memory.current", "memory.stat"), "inactive_file"),
    (("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"), "total_inactive_file"),
])  # fmt: skip
def test_automatic_memory_keeps_to_a_containers_limit(names, cached, tmp_path, monkeypatch):
    (tmp_path / "memory").mkdir()
    for name, text in zip(names, ("1000000\n", "700000\n", f"anon 1\n{cached} 200000\n"), strict=True):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("moesaic.machine.CONTROL", tmp_path)
    assert expert_memory_bytes("auto", 10**9, torch.device("cpu")) == 350_000
    (tmp_path / names[0]).write_text("max\n")
    assert expert_memory_bytes("auto", 1_000, torch.device("cpu")) == 1_000


def test_automatic_memory_is_all_where_it_fits():
    assert expert_memory_bytes("auto", 1_000, torch.device("cpu")) == 1_000


@pytest.mark.parametrize("text", ["", "much", "0", "0%", "101%", "-5MB", "5XB", True, 1.5, None, "auto "])
def test_other_memory_is_refused(text):
    with pytest.raises(InputError, match="512MB"):
        check_expert_memory(text)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--expert-memory much", "give bytes such as 512MB"),
        ("--expert-memory 1kb", "that one token runs in a layer"),
        ("--expert-memory 50% --cache nru", "Did you mean 'lru'"),
        ("--expert-memory 50% --cache belady", "for simulations only"),
        ("--expert-memory 50% --cache lru:per_layer=3", "per_layer"),
        ("--expert-memory 50% --cache-bias 2", "a share of the range"),
        ("--expert-memory 50% --experts eager", "exclude each other"),
        ("--cache lru", "no use without --expert-memory"),
        ("--cache-bias 0.5", "no use without --expert-memory"),
        ("--no-prefetch", "no use without --expert-memory"),
        ("--expert-memory 50% --cache-bias 0.5 --select top-p:p=0.5", "does not go with"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(words, says, run):
    code, out, err = run("generate", "tiny-moe", "Once", *words.split())
    assert code == 2
    assert out == ""
    assert says in err.replace("\n", " ")


def test_a_dense_model_is_refused(run):
    code, _, err = run("generate", "tiny", "Once", "--expert-memory", "50%")
    assert code == 2
    assert "is dense" in err


def test_routing_that_is_changed_is_said(run):
    for verb in (["generate", "tiny-moe", "The first", "--max-new-tokens", 2], ["serve", "tiny-moe", "--dry-run"]):
        code, _, plain = run(*verb, "--expert-memory", "50%")
        assert (code, "--cache-bias" in plain) == (0, False)
        code, _, said = run(*verb, "--expert-memory", "50%", "--cache-bias", 0.3)
        assert (code, "--cache-bias 0.3" in said, "change" in said) == (0, True, True)
    model, _ = moesaic.load("tiny-moe", store=StoreOptions("50%", cache_bias=0.3))
    assert model.expert_store.report()["cache_bias"] == 0.3


def test_the_command_line(run):
    plain = run("generate", "tiny-moe", "Once upon", "--max-new-tokens", "12")[1]
    code, out, err = run("generate", "tiny-moe", "Once upon", "--max-new-tokens", "12", "--expert-memory", "30%")
    assert (code, out) == (0, plain)
    assert "in memory when used" in err
    code, out, _ = run("evaluate", "tiny-moe", "--max-tokens", "256", "--window", "64", "--expert-memory", "40%",
                       "--cache", "lru", "--no-prefetch", "--json")  # fmt: skip
    assert code == 0
    assert json.loads(out)["expert_store"]["prefetched"] == 0

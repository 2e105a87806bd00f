import copy
import gzip
import json
import math
import os
import platform
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch.nn.functional import cross_entropy, log_softmax

import moesaic
from moesaic import InputError
from moesaic.evaluation.benchmark import benchmark
from moesaic.evaluation.cost import active_weights, ffn_of
from moesaic.evaluation.evaluate import check_request, harness_scores
from moesaic.evaluation.inspect import prompt_tokens
from moesaic.evaluation.perplexity import PROTOCOLS, perplexity
from moesaic.evaluation.sizes import cut_length
from moesaic.evaluation.tasks import evaluate_tasks, read_tasks, score_pairs
from moesaic.machine import give_back_memory
from moesaic.models.families import decoder_layers
from moesaic.results.evaluation import perplexity_of


@pytest.fixture(scope="module")
def tiny():
    return moesaic.load("tiny", dtype=torch.float32)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n = Title = \n \n The first sentence of the text .\n" * 40)
    return path


@torch.no_grad()
def test_gptq_protocol_is_the_published_one(tiny, text):
    model, tokenizer = tiny
    rows = text.read_text().split("\n")[:-1]
    joined = "\n\n".join(row + "\n" if row.strip() else "" for row in rows)
    ids = tokenizer(joined, add_special_tokens=False, verbose=False)["input_ids"]
    windows = [[0, *ids[i : i + 63]] for i in range(0, len(ids) // 63 * 63, 63)]
    losses = [model(torch.tensor([w]), labels=torch.tensor([w])).loss.item() for w in windows]
    result = perplexity(model, tokenizer, text=text, window=64)
    assert result.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert result.tokens == 64 * len(windows)
    assert result.protocol == "gptq"


def naive_losses(model, window):
    with torch.no_grad():
        logits = model(torch.tensor([window])).logits[0, :-1]
    return cross_entropy(logits, torch.tensor(window[1:]), reduction="none")


def test_llama_cpp_scores_second_halves_with_bos_in_the_first_place(tiny, text):
    model, tokenizer = tiny
    ids = tokenizer(text.read_text(), verbose=False)["input_ids"]  # opens with BOS
    losses = []
    for i in range(0, len(ids) // 64 * 64, 64):
        window = [0, *ids[i + 1 : i + 64]]
        losses += naive_losses(model, window)[32:].tolist()
    result = perplexity(model, tokenizer, text=text, window=64, protocol="llama.cpp")
    assert result.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)


def rolling(model, ids):
    """Losses of windows of 64; what is left over has a whole window before it, as the harness gives it."""
    whole, left = divmod(len(ids) - 1, 64)
    losses = [naive_losses(model, ids[i : i + 65]) for i in range(0, 64 * whole, 64)]
    assert left
    return [*losses, naive_losses(model, ids[-65:])[-left:]]


def test_lm_eval_scores_every_token_once_given_the_one_before(tiny, text):
    model, tokenizer = tiny
    ids = tokenizer(text.read_text(), verbose=False)["input_ids"]
    losses = rolling(model, ids)
    assert sum(map(len, losses)) == len(ids) - 1
    words = len(text.read_text().split())
    result = perplexity(model, tokenizer, text=text, window=64, protocol="lm-eval")
    assert result.perplexity == pytest.approx(math.exp(torch.cat(losses).sum().item() / words), rel=1e-3)


def test_rows_are_joined_as_the_published_data_sets_are(tiny, text, tmp_path):
    """The rows of a file in the hub's form, and the plain text that is made of them, are one stream."""
    rows = [line + "\n" if line.strip() else "" for line in text.read_text().split("\n")[:-1]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    (tmp_path / "text.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + text.read_bytes()))
    plain, packed, joined = (
        perplexity(*tiny, text=tmp_path / name, window=64) for name in ("text.txt", "text.txt.gz", "rows.jsonl")
    )
    assert plain.perplexity == packed.perplexity == joined.perplexity
    assert plain.data_sha256 == packed.data_sha256
    for protocol in ("llama.cpp", "lm-eval"):
        with pytest.raises(InputError, match=r"is defined on a raw text, '.*rows.jsonl' has rows"):
            perplexity(*tiny, text=tmp_path / "rows.jsonl", window=64, protocol=protocol)


def test_without_bos_and_eos_the_first_token_is_not_scored(tiny, text):
    model, tokenizer = tiny
    bare = copy.deepcopy(tokenizer)
    bare.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B")
    bare.bos_token = bare.eos_token = None
    ids = bare(text.read_text(), verbose=False)["input_ids"]
    losses = torch.cat(rolling(model, ids))
    result = perplexity(model, bare, text=text, window=64, protocol="lm-eval")
    words = len(text.read_text().split())
    assert result.perplexity == pytest.approx(math.exp(losses.sum().item() / words), rel=1e-3)


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.pdf", b"words", "named .pdf, which is not read"),
        ("a.raw", "words".encode("utf-16"), "is UTF-16 text"),
        ("a.raw", b" \n", "holds no text"),
        ("a.jsonl", b'{"body": 1}', ":1 is a JSON object with 'body'"),
    ],
)
def test_what_is_no_text_is_refused_before_any_work(name, data, says, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=says):
        check_request(tmp_path / name, "gptq", 64, None, None, None)


def test_the_default_is_bundled_text_within_a_limit(tiny):
    result = perplexity(*tiny, window=64, max_tokens=640)
    assert result.tokens == 640
    assert 20 < result.perplexity < 80


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"protocol": "mine"}, f"choose from: {', '.join(PROTOCOLS)}"),
        ({"window": 4096}, "2 to 2048"),
        ({"window": 64, "max_tokens": 10}, "less than one window"),
        ({"protocol": "llama.cpp"}, "give one with --text"),
    ],
)
def test_bad_requests(tiny, options, says):
    with pytest.raises(InputError, match=says):
        perplexity(*tiny, **options)


@torch.no_grad()
def naive_score(model, tokenizer, context, continuation):
    """One pair, whole and alone."""
    whole, start = tokenizer(context + continuation)["input_ids"], len(tokenizer(context)["input_ids"])
    logits = model(torch.tensor([whole]), use_cache=False).logits[0]
    score = sum(log_softmax(logits[i - 1], -1)[whole[i]].item() for i in range(start, len(whole)))
    return score, all(logits[i - 1].argmax() == whole[i] for i in range(start, len(whole)))


@pytest.mark.parametrize(
    "pairs",
    [
        (("The house is", " a very old building"), ("The house", " is")),
        (("The old house is", " a ruin"), ("The old house is", " a very old building")),
        (("The house is", " old"), ("A house is", " old")),
        (("The house is", " old"),),
        (("", "old"), ("", "older")),
    ],
)
def test_choices_are_scored_by_their_likelihood(tiny, pairs):
    for pair, (score, greedy) in zip(pairs, score_pairs(*tiny, pairs), strict=True):
        naive, naive_greedy = naive_score(*tiny, *pair)
        assert score == pytest.approx(naive, abs=1e-3)
        assert greedy == naive_greedy


def test_an_empty_context_is_what_the_tokenizer_begins_with(tiny):
    model, tokenizer = tiny
    bare = copy.deepcopy(tokenizer)
    bare.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B")  # as Qwen's, it adds no BOS
    expected = [naive_score(model, tokenizer, "", word)[0] for word in (" the", " house of")]
    found = [score for score, _ in score_pairs(model, bare, [("", " the"), ("", " house of")])]
    assert found == pytest.approx(expected, abs=1e-3)
    bare.bos_token = bare.eos_token = None
    with pytest.raises(InputError, match="has no context, and this tokenizer nothing to begin with"):
        score_pairs(model, bare, [("", " the")])


def test_padding_changes_no_score_in_any_family(folders, family):
    loaded = moesaic.load(folders(family), dtype=torch.float32)
    context = "The old house by the river is a very old building and nobody knows who lived in it"
    pairs = (("The", " house"), (context, " at the time of the king"), (context, " before"))
    scores = [score for score, _ in score_pairs(*loaded, pairs)]
    assert scores == pytest.approx([naive_score(*loaded, *pair)[0] for pair in pairs], abs=1e-3)


def test_task_files_of_all_forms(tiny, tmp_path):
    model, tokenizer = tiny
    rows = [
        {"task": "a", "id": 1, "ctx": "Once upon a", "choices": ["time", "zq zq zq"], "gold": 0},
        {"task": "a", "id": 2, "ctx": "Once upon a", "choices": ["time", "zq zq zq"], "gold": 1},
        {"task": "w", "ctxs": ["The cat", "zq zq zq"], "cont": "is in the house.", "gold": 0},
        {"task": "l", "ctx": "Once upon a", "cont": "zq"},
    ]
    path = tmp_path / "tasks.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    result = evaluate_tasks(model, tokenizer, read_tasks(path))
    assert result["a"].to_dict() == {"acc": 0.5, "acc_norm": 0.5, "stderr": 0.5, "n": 2}
    assert result["l"].acc == 0
    assert result["mean"].n == 4
    assert [item.task for item in read_tasks(path, per_task=1)] == ["a", "w", "l"]
    for bad, says in [("{}", ":1 is not a task item"), ("", "holds no items")]:
        path.write_text(bad)
        with pytest.raises(InputError, match=says):
            read_tasks(path)
    path.write_text(json.dumps({**rows[0], "gold": 7}))
    with pytest.raises(InputError, match="gold is not the number"):
        read_tasks(path)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("[1]", "it is a list"),
        ("7", "it is a number"),
        ("null", "it is null"),
        ("[" * 200_000, "nested too deeply"),
        ('{"gold": ' + "7" * 5_000 + "}", "thousands of digits"),
        ('{"task": "a", "ctx": "b", "choices": 5, "gold": 0}', "'choices' is no list of texts"),
        ('{"task": "a", "ctx": "b", "choices": "cd", "gold": 0}', "'choices' is no list of texts"),
        ('{"task": "a", "ctx": "b", "choices": ["c", 1], "gold": 0}', "'choices' is no list of texts"),
        ('{"task": "a", "ctx": "b", "choices": ["c", "d"], "gold": "a"}', "gold is not the number of a choice, 0 to 1"),
        ('{"task": "a", "ctx": "b", "choices": ["c", "d"], "gold": true}', "gold is not the number"),
        ('{"task": "a", "ctx": "b", "choices": ["c", "d"], "gold": NaN}', "gold is not the number"),
        ('{"task": "a", "ctx": "b", "choices": ["c", "d"], "gold": -1}', "gold is not the number"),
        ('{"task": "a", "ctx": "b", "choices": ["c", "d"]}', "choices without gold"),
        ('{"task": "a", "ctx": 3, "cont": "c"}', "'ctx' is a number, not text"),
        ('{"task": ["a"], "ctx": "b", "cont": "c"}', "'task' is a list, not text"),
        ('{"task": "a", "ctxs": "b", "cont": "c", "gold": 0}', "'ctxs' is no list of texts"),
        ('{"task": "a", "ctxs": ["b", "d"], "gold": 0}', "no 'cont'"),
        ('{"task": "mean", "ctx": "b", "cont": "c"}', "'mean' is the name of the mean over tasks"),
    ],
)
def test_task_items_of_wrong_types_are_named(tmp_path, line, says):
    (tmp_path / "tasks.jsonl").write_text('{"task": "a", "ctx": "b", "cont": "c"}\n' + line)
    with pytest.raises(InputError, match=says) as error:
        read_tasks(tmp_path / "tasks.jsonl")
    assert "tasks.jsonl:2 is not" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_harness_says_how_to_get_it(tiny, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"pip install 'moesaic\[eval\]'"):
        moesaic.evaluate(*tiny, harness="arc_easy", max_tokens=64, window=64)


def test_what_the_harness_gives_is_read():
    """A group of tasks is a result and has no number of items of its own; of one item the error is `N/A`."""
    done = {
        "results": {
            "group": {"acc,none": 0.5, "acc_stderr,none": 0.1}, "a": {"acc,none": 0.25, "acc_norm,none": 0.5},
            "b": {"acc,none": 1, "acc_stderr,none": "N/A"},
        },
        "group_subtasks": {"group": ["a", "b"], "a": [], "b": []},
        "n-samples": {"a": {"original": 9, "effective": 4}, "b": {"original": 9, "effective": 1}},
    }  # fmt: skip
    found = harness_scores(done)
    assert [found[name].n for name in ("group", "a", "b")] == [5, 4, 1]
    assert (found["b"].acc, found["b"].stderr, found["a"].acc_norm) == (1.0, None, 0.5)


def test_prompts_of_several_sequences_are_cut_and_one_is_not():
    assert [cut_length(4_096, 1), cut_length(512, 4), cut_length(512, 32)] == [4_096, 512, 64]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--items", "3"], "--items has no use without --tasks or --generate"),
        (["--generate", "q.jsonl", "--reference-tokens", "3"], "--reference-tokens has no use without --reference"),
    ],
)
def test_options_without_a_use_are_refused(run, tmp_path, monkeypatch, options, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q.jsonl").write_text(json.dumps({"question": "1 + 1?", "answer": "2"}) + "\n")
    code, _, err = run("evaluate", "tiny", *options)
    assert code == 2
    assert says in err


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    out = tmp_path_factory.mktemp("tiny") / "out"
    config = moesaic.ConvertConfig(plan="S1A2E8", tokens=2_048, held_out_tokens=1_024)
    metrics = moesaic.convert("tiny", out, config)
    return out, metrics


def test_benchmark_compares_and_counts(tiny, converted):
    dense, tokenizer = tiny
    model, _ = moesaic.load(converted[0], dtype=torch.float32)
    result = benchmark(model, dense, prompt_tokens(tokenizer, 32, 3), new=4, batches=(1, 3), rounds=2)
    assert result.decode.keys() == {"1", "3"}
    assert result.prefill.keys() == {"32"}
    assert result.block.keys() == {"1", "8", "32"}
    assert result.decode["1"].experts_touched == 2
    assert 2 < result.decode["3"].experts_touched <= 6
    assert result.block["32"].experts_touched > 6
    small, large = result.block["1"], result.block["32"]
    ffn = 3 * dense.config.hidden_size * dense.config.intermediate_size
    assert (small.dense_bytes, large.dense_flops) == (4 * ffn, 2 * 32 * ffn)
    assert small.bytes / small.dense_bytes == pytest.approx(3 / 8, rel=0.05)
    with pytest.raises(InputError, match="different dtypes"):
        benchmark(model, moesaic.load("tiny")[0], prompt_tokens(tokenizer, 32))
    for group in (result.decode, result.prefill, result.block):
        for value in group.values():
            least, greatest = value.speedup_range
            assert 0 < least <= value.speedup <= greatest
            assert value.share_of_limit == pytest.approx(value.speedup / value.limit)
            assert value.limit > (1 if value.experts_touched < 6 else 0.99)  # routers cost a little


def test_weights_read_a_step_are_counted(tiny, converted):
    """Bytes, not seconds: 3/8 of the FFN for one token, all of it when all seven experts are touched."""
    dense, _ = tiny
    model, _ = moesaic.load(converted[0], dtype=torch.float32)
    ffn = sum(p.numel() for layer in decoder_layers(dense) for p in ffn_of(layer).parameters())
    gates = sum(p.numel() for n, p in model.named_parameters() if ".gate." in n)
    assert active_weights(dense) == sum(p.numel() for p in dense.parameters())  # tied: the head is read whole
    assert active_weights(model) == pytest.approx(active_weights(dense) - ffn * 5 / 8 + gates)
    layers = model.config.num_hidden_layers
    assert active_weights(model, [7] * layers) == pytest.approx(active_weights(dense) + gates)
    assert active_weights(model, [2] * layers) == active_weights(model)


def test_inspect_tells_what_was_saved(converted, tmp_path):
    facts = moesaic.inspect(converted[0])
    assert facts.metrics.plan == "S1A2E8"
    assert facts.moe["num_experts"] == 7
    assert facts.config["seed"] == 0
    assert facts.model == "tiny"
    with pytest.raises(InputError, match=r"holds no moesaic\.yaml"):
        moesaic.inspect(tmp_path)


@pytest.mark.slow
def test_better_methods_are_better_on_a_real_model(tmp_path):
    """The order that the tool rests on: dense < recovered routed < recovered static < FLAP; CMoE needs recovery."""
    ratio = {}
    for name, recovery in [
        ("coactivation", "closed-form"),
        ("static", "closed-form"),
        ("static", "none"),
        ("cmoe", "none"),
    ]:
        config = moesaic.ConvertConfig(active=0.25, partition=name, recovery=recovery)
        metrics = moesaic.convert("tiny", tmp_path / f"{name}-{recovery}", config)
        ratio[name, recovery] = metrics.perplexity / metrics.perplexity_dense
    best = ratio["coactivation", "closed-form"]
    assert 1 < best < ratio["static", "closed-form"] < ratio["static", "none"]
    assert best < ratio["cmoe", "none"]


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="other allocators keep nothing back, or have no such call"
)
def test_freed_memory_goes_back_to_the_system():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    blocks = [bytearray(b"x" * 60_000) for _ in range(4_000)]  # 240 MB, each too small for a map of its own
    pins = blocks[::100]
    full = resident()
    del blocks
    give_back_memory()
    assert len(pins) == 40
    assert resident() < full - 150_000_000


def test_a_loss_without_bounds_has_a_perplexity_and_none_has_none():
    assert perplexity_of(math.log(12.5)) == pytest.approx(12.5)
    assert perplexity_of(math.inf) == perplexity_of(700) < math.inf
    assert math.isnan(perplexity_of(math.nan))

"""How many experts run for which tokens, and how many would be best: means, the oracle, the page, bad input."""

import io
import itertools
import json
import math
import re

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import moesaic
from conftest import small_model
from moesaic import InputError
from moesaic.calibration.text import bundled
from moesaic.checkpoint.builtin import tiny_folder
from moesaic.evaluation.experts import InspectedText, inspect_passage, make_windows
from moesaic.evaluation.oracle import OwnRanker, choose, interpolate, run_counts
from moesaic.evaluation.perplexity import window_losses
from moesaic.evaluation.tokens import KINDS, token_kind, token_texts
from moesaic.models.moe_block import find_blocks
from moesaic.moe.adaptive import attach
from moesaic.moe.counting import mean_experts
from moesaic.report.experts import gap, show_experts, show_oracle
from moesaic.report.passage import write_experts_page, write_heat_map, write_passage_page
from moesaic.routing.selection.relative import Relative
from moesaic.routing.selection.top_k import TopK
from moesaic.routing.selection.top_p import TopP
from test_moe_block import CHOSEN, EXPERTS, SIZES, STOCK, ours

ROOMY = {"vocab_size": 1024, "max_position_embeddings": 256}
FEW = {"tokens": 64, "window": 16}
RULE = Relative(threshold=0.8)


def mixture(name):
    """A model whose routers are sure of some tokens and not of others."""
    if name == "ours":
        model = ours()
    else:
        config_class, fields, *_ = STOCK[name]
        torch.manual_seed(0)
        config = config_class(**SIZES | ROOMY | fields | {"num_experts_per_tok": CHOSEN})
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.data = torch.randn_like(parameter) * 0.1
    for block in find_blocks(model):
        block.router.get_parameter("weight").data *= 8
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny_folder())


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    made = tmp_path_factory.mktemp("see") / "qwen3-moe"
    mixture("qwen3-moe").save_pretrained(made)
    tokenizer.save_pretrained(made)
    return made


def shown(show, result, width=80):
    console = Console(file=io.StringIO(), width=width)
    show(console, result)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("text", "before", "kind"),
    [
        (" the", "see", "word start"), ("The", "", "word start"), ("ing", "go", "word continuation"),
        ("(self", "f", "word start"), ("'s", "dog", "word continuation"), (" 'em", "g", "word start"),
        ("t", "n'", "word continuation"), ("s", " '", "word start"), (" 1984", "in", "number"), (".5", "1", "number"),
        ("nd", "2", "word start"), (",", "x", "punctuation"), (" ==", "x", "punctuation"), ("});\n", "", "punctuation"),
        ("_", "x", "punctuation"), ("\n", "x", "whitespace"), ("  \t", "", "whitespace"), ("", "x", "other"),
        ("\ufffd", "", "other"), ("中", "", "word start"), ("文", "中", "word continuation"), ("½", "", "number"),
    ],
)  # fmt: skip
def test_kinds_of_tokens(text, before, kind):
    assert token_kind(text, before) == kind
    assert kind in KINDS


def test_texts_of_tokens_join_to_the_text(tokenizer):
    text = "Don't stop: naïve 中文 🙂, 3.14\n\n  def f(x):"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = token_texts([tokenizer.eos_token_id, *ids], tokenizer)
    assert "".join(token.text for token in found[1:]) == text
    assert found[0].kind == "other"
    assert token_texts([], tokenizer) == []


@pytest.mark.parametrize("name", ["qwen3-moe", "deepseek-v3", "ours"])
def test_means_are_those_of_the_model(name, tokenizer):
    model = mixture(name)
    with attach(model, RULE):
        found = moesaic.inspect_experts(model, tokenizer, tokens=256, window=32)
        cut = make_windows(model, tokenizer, InspectedText(bundled("heldout"), "", 256, False), 32).tokens_NL
        means = mean_experts(model, lambda: [model(input_ids=tokens_L[None, :-1]) for tokens_L in cut]).by_layer
        loss = torch.cat([window_losses(model, tokens_L) for tokens_L in cut]).mean().item()
    assert found.experts_by_layer == pytest.approx(means)
    assert found.experts_per_token == pytest.approx(sum(means) / len(means))
    assert found.loss == pytest.approx(loss)
    assert found.varies
    for groups in (found.by_kind, found.by_domain, found.by_difficulty):
        assert sum(group.tokens for group in groups.values()) == found.tokens == 8 * 31
        for key in ("experts_per_token", "loss"):
            total = sum(group.tokens * getattr(group, key) for group in groups.values())
            assert total / found.tokens == pytest.approx(getattr(found, key))
    losses = [group.loss for group in found.by_difficulty.values()]
    assert losses == sorted(losses)
    assert list(found.by_domain) == ["c4", "stackexchange", "github", "book", "wikipedia", "math_tex"]
    assert found.layers == [block.layer for block in find_blocks(model)]
    assert len(found.passage.tokens) == 31
    assert {len(token.experts) for token in found.passage.tokens} == {len(means)}
    assert type(found).from_dict(found.to_dict()) == found


def test_a_fixed_number_is_said_to_be_fixed(tokenizer):
    found = moesaic.inspect_experts(mixture("qwen3-moe"), tokenizer, **FEW)
    assert (found.varies, found.experts_per_token, found.experts_by_layer) == (False, CHOSEN, [CHOSEN, CHOSEN])
    assert "The number is the same for all tokens of a layer" in " ".join(shown(show_experts, found).split())


@pytest.mark.parametrize("name", ["qwen3-moe", "olmoe", "glm4-moe", "gpt-oss", "ours"])
@torch.no_grad()
def test_a_run_with_given_counts_is_that_rules_own_run(name, tokenizer):
    """Whatever rule is at work in the model: it is neither probed nor asked by way of it."""
    model, tokens_L = mixture(name), torch.arange(20) % 64
    with attach(model, RULE):
        rankers = [OwnRanker(block) for block in find_blocks(model)]
        for count in (1, 2, EXPERTS):
            with run_counts(rankers, torch.full((19, len(rankers)), count)):
                found = window_losses(model, tokens_L)
            with attach(mixture(name), TopK(k=count)) as alone:
                torch.testing.assert_close(found, window_losses(alone.model, tokens_L))


def best_by_hand(losses_TC, costs, budget):
    """The least mean loss at a summed cost of at most `budget`, of all choices."""
    choices = itertools.product(range(len(costs)), repeat=len(losses_TC))
    fitting = (c for c in choices if sum(costs[i] for i in c) <= budget)
    return min(sum(losses_TC[t, i].item() for t, i in enumerate(c)) for c in fitting) / len(losses_TC)


@pytest.mark.parametrize("seed", range(6))
def test_the_oracle_is_brute_force(seed):
    generator = torch.Generator().manual_seed(seed)
    losses_TC, cost_C = torch.randn(6, 4, generator=generator).double(), torch.tensor([1, 2, 3, 4])
    for mean in (1, 1.5, 2, 2.4, 3, 4):
        chosen_T = choose(losses_TC, cost_C, mean)
        spent, loss = int(cost_C[chosen_T].sum()), losses_TC.gather(1, chosen_T[:, None]).mean().item()
        assert spent <= mean * 6 + 1e-6
        assert loss == pytest.approx(best_by_hand(losses_TC, cost_C.tolist(), spent))
        assert spent == 6 or loss >= best_by_hand(losses_TC, cost_C.tolist(), int(mean * 6)) - 1e-9


def test_equal_tokens_change_as_far_as_the_budget_goes():
    losses_TC = torch.tensor([[2.0, 1.0]]).double().repeat(10, 1)
    assert choose(losses_TC, torch.tensor([1, 2]), 1.35).sum() == 3
    assert interpolate(torch.tensor([4.0, 2.0, 1.0]), torch.tensor([1, 2, 3]), 1.75) == 2.5
    assert interpolate(torch.tensor([4.0, 2.0]), torch.tensor([1, 2]), 2.0) == 2.0


@pytest.mark.parametrize("name", ["qwen3-moe", "ours"])
def test_the_oracle_of_a_model_is_brute_force(name, tokenizer):
    """One window of few tokens, whose losses are measured here one number of experts after the other."""
    model = mixture(name)
    with attach(model, RULE):
        found = moesaic.inspect_oracle(model, tokenizer, tokens=7, window=7, at_most=5)
        policy = moesaic.inspect_experts(model, tokenizer, tokens=7, window=7)
        tokens_L = make_windows(model, tokenizer, InspectedText(bundled("heldout"), "", 7, False), 7).tokens_NL[0]
    assert found.counts == [1, 2, 3, 4, 5]
    columns = []
    for count in found.counts:
        with attach(model, TopK(k=count)):
            columns.append(window_losses(model, tokens_L))
    losses_TC = torch.stack(columns, dim=1).double()
    assert found.loss_by_count == pytest.approx(losses_TC.mean(0).tolist(), rel=1e-5)
    spent = round(found.oracle_experts_per_token * 6)
    assert found.oracle_loss == pytest.approx(best_by_hand(losses_TC, found.counts, spent), rel=1e-5)
    assert (found.experts_per_token, found.loss) == (policy.experts_per_token, pytest.approx(policy.loss))
    assert found.oracle_experts_per_token <= found.experts_per_token + 1e-9
    assert sum(found.oracle_tokens) == sum(found.policy_tokens) == found.tokens == 6
    assert found.gap_closed == pytest.approx((found.fixed_loss - found.loss) / (found.fixed_loss - found.oracle_loss))


def test_a_fixed_number_closes_no_gap(tokenizer):
    ticks = []
    found = moesaic.inspect_oracle(
        mixture("qwen3-moe"), tokenizer, **FEW, progress=lambda done, count, _: ticks.append((done, count))
    )
    assert found.counts == [1, 2]
    assert found.loss == pytest.approx(found.fixed_loss, rel=1e-6)
    assert found.gap_closed == pytest.approx(0, abs=1e-4)
    assert found.policy_tokens == [0, 60]
    assert ticks[-1] == (12, 12)
    assert "oracle" in shown(show_oracle, found)
    assert [gap(part).partition(" ")[0] for part in (None, -0.5, 0.5)] == ["the", "what", "what"]
    assert type(found).from_dict(found.to_dict()) == found


def test_a_number_for_each_layer_is_the_best_one_layer_after_the_other(tokenizer):
    """One token: its loss in the window is what a search by hand finds."""
    model = mixture("qwen3-moe")
    found = moesaic.inspect_oracle(model, tokenizer, tokens=2, window=2, at_most=EXPERTS, by_layer=True)
    tokens_L = make_windows(model, tokenizer, InspectedText(bundled("heldout"), "", 2, False), 2).tokens_NL[0]
    rankers = [OwnRanker(block) for block in find_blocks(model)]

    def loss(*counts):
        with run_counts(rankers, torch.tensor([counts])):
            return window_losses(model, tokens_L).item()

    start = min((1, 2), key=lambda n: loss(n, n))
    first = min((1, 2), key=lambda n: loss(n, start))
    second = min((1, 2), key=lambda n: loss(first, n))
    assert found.experts_by_layer == [first, second]
    assert found.by_layer_loss == pytest.approx(loss(first, second), rel=1e-5)
    assert "a number for each layer" in shown(show_oracle, found)


def test_tokens_without_routed_experts_are_tried_too(tokenizer):
    model = mixture("ours")
    with attach(model, TopP(p=0.0, at_least=0, at_most=1)):
        found = moesaic.inspect_oracle(model, tokenizer, **FEW)
    assert found.counts[0] == min(0, int(found.experts_per_token))
    assert math.isfinite(found.oracle_loss)


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit(tokenizer, width):
    model = mixture("qwen3-moe")
    for show, found in (
        (show_experts, moesaic.inspect_experts(model, tokenizer, **FEW)),
        (show_oracle, moesaic.inspect_oracle(model, tokenizer, **FEW, at_most=EXPERTS)),
    ):
        lines = shown(show, found, width).splitlines()
        assert max(map(len, lines)) <= width
        assert not [line for line in lines if "…" in line]


def test_the_page_holds_everything_and_shows_tokens_as_they_are(tokenizer, tmp_path):
    text = tmp_path / "evil.txt"
    text.write_text('<script>alert(1)</script> & "quoted" $x_1$ <b>\n\n' * 20)
    model = mixture("qwen3-moe")
    with attach(model, RULE):
        found = moesaic.inspect_experts(model, tokenizer, text=text, window=64)
        passage = inspect_passage(model, tokenizer)
    write_experts_page(found, tmp_path / "a.html")
    write_passage_page(passage, tmp_path / "b.html", "<b>")
    for name in ("a.html", "b.html"):
        page = (tmp_path / name).read_text()
        assert not re.search(r"https?://|<link|<img|src=|@import|url\((?!#)", page)
        assert page.count("<script>") == 1
        assert "alert(1)</script>" not in page
        assert 'data-tip="' in page
    assert "layers 0-1: " in page
    assert list(found.by_domain) == ["evil"]
    write_heat_map(found.passage, tmp_path / "a.png", "$x")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_line_shows_both_views(run, folder, tmp_path):
    words = ("inspect", folder, "--select", "top-p:p=0.5", "--tokens", "64", "--window", "16")
    page, picture = tmp_path / "a.html", tmp_path / "a.png"
    code, out, err = run(*words, "--adaptive", "--json", "--plot", picture, "--html", page)
    assert code == 0, err
    found = json.loads(out)
    assert (found["rule"], found["model"], found["tokens"]) == ("top-p:p=0.5", str(folder), 60)
    assert page.is_file()
    assert picture.is_file()
    code, out, err = run(*words, "--oracle", "--at-most", "4", "--by-layer", "--json")
    assert code == 0, err
    assert json.loads(out)["counts"] == [1, 2, 3, 4]
    assert len(json.loads(out)["experts_by_layer"]) == 2
    code, out, err = run(*words, "--adaptive")
    assert (code, out) == (0, "")
    assert "word start" in err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("tiny --adaptive", "is dense: there are no experts"),
        ("tiny --oracle", "is dense: there are no experts"),
        ("MODEL --adaptive --oracle", "give one of them"),
        ("MODEL --select top-k:k=1", "--select is for --adaptive or --oracle or --trace"),
        ("MODEL --plot a.png", "--plot is for --adaptive; give it too"),
        ("MODEL --adaptive --at-most 2", "--at-most is for --oracle"),
        ("MODEL --adaptive --by-layer", "--by-layer is for --oracle"),
        ("MODEL --oracle --html a.html", "--html is for --adaptive"),
        ("MODEL --adaptive --html nowhere/a.html", "--html nowhere/a.html: there is no folder"),
        ("MODEL --adaptive --html a.txt", "--html a.txt must end in .html"),
        ("MODEL --adaptive --plot nowhere/a.png", "--plot nowhere/a.png"),
        ("MODEL --adaptive --adapter MODEL --select top-k:k=1", "give one of them"),
        ("MODEL --adaptive --adapter MODEL", "holds no adapter"),
        (f"MODEL --adaptive --adapter {'x' * 5_000}", "holds no adapter"),
        ("MODEL --adaptive --select nothing", "nothing"),
        ("MODEL --adaptive --text SHORT", "give more text or ask for fewer or shorter windows"),
        ("MODEL --adaptive --text nowhere.txt", "no text file 'nowhere.txt'"),
        ("MODEL --adaptive --window 512", "more than the model's longest, 256 tokens"),
        ("MODEL --adaptive --tokens 8", "--tokens 8 is less than one window of 256"),
        ("MODEL --adaptive --window 0", "--window is 0"),
        ("MODEL --oracle --at-most 7", "--at-most is 7"),
        ("MODEL --oracle --at-most 1 --tokens 32 --window 16", "give 2 or more"),
        ("MODEL --adaptive --device meta", "meta"),
        ("nowhere --adaptive", "no model 'nowhere'"),
    ],
)
def test_bad_input_is_one_line(run, folder, tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("too short")
    places = {"MODEL": folder, "SHORT": tmp_path / "short.txt"}
    code, out, err = run("inspect", *(places.get(word, word) for word in words.split()))
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert says in err
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


def test_python_refuses_a_dense_model(tokenizer):
    for call in (moesaic.inspect_experts, moesaic.inspect_oracle):
        with pytest.raises(InputError, match="is dense"):
            call(small_model("llama"), tokenizer)


def test_adapt_draws_a_passage_into_what_it_writes(folder, tmp_path):
    config = moesaic.AdaptConfig(method="relative", samples=8, window=32, held_out=4, tokens=256)
    moesaic.adapt(folder, tmp_path / "out", config)
    assert (tmp_path / "out" / "experts.png").read_bytes().startswith(b"\x89PNG")
    assert "experts a token, relative" in (tmp_path / "out" / "experts.html").read_text()

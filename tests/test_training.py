"""Light training: its mathematics first, then that it learns, resumes, never harms, and what it writes."""

import copy
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from torch.nn.functional import kl_div, log_softmax

import moesaic
from conftest import QUICK
from moesaic import FinetuneConfig, InputError, WorkError, registry
from moesaic.calibration.documents import Document, Message, chat
from moesaic.calibration.text import bundled, read_documents
from moesaic.checkpoint.reader import Checkpoint
from moesaic.formats.converted import Converted
from moesaic.models.moe_block import count_load
from moesaic.models.tokenizer import load_tokenizer
from moesaic.moe.kernels import _by_transformers
from moesaic.moe.modeling import moe_blocks
from moesaic.training.data import make_samples
from moesaic.training.expert_load import balance_loss, move_bias, summary, watched
from moesaic.training.losses import Objective, distance, layer_distance, next_token
from moesaic.training.methods.factorllm import labels
from moesaic.training.parameters import check_gradients, counts, same_dtype, trainable
from moesaic.training.schedule import schedule
from moesaic.training.trainer import training_mode

METHODS = [name for name in registry.names("method") if name != "read-me"]  # which has tests of its own
SHORT = FinetuneConfig(window=64, samples=64, batch=4, held_out=8, steps=8, evaluations=4, device="cpu", teacher="tiny")
RATES = {"lora": 1e-3, "rmoe": 1e-3, "full": 2e-4, "factorllm": 2e-4}


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """The folder of `tiny`, converted."""
    folder = tmp_path_factory.mktemp("converted") / "tiny"
    moesaic.convert("tiny", folder, QUICK.model_copy(update={"active": 0.25, "partition": "specialists"}))
    return folder


def working(folder):
    return Converted(folder).load(torch.float32).eval()


def tensors(folder):
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.names()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# objective


def rows(seed=0, rows=70, vocabulary=200, kept=10):
    g = torch.Generator().manual_seed(seed)
    logits, teacher = (2 * torch.randn(rows, vocabulary, generator=g) for _ in range(2))
    top = teacher.log_softmax(-1).topk(kept)
    target = torch.randint(vocabulary, (rows,), generator=g)
    return logits.requires_grad_(), target, torch.rand(rows, generator=g) > 0.3, (top.values, top.indices), teacher


def test_distance_from_all_logits_is_the_divergence():
    logits, _, _, top, teacher = rows(kept=200)
    expected = kl_div(logits.log_softmax(-1), log_softmax(teacher, -1), log_target=True, reduction="sum")
    assert torch.allclose(distance(logits, *top), expected, rtol=1e-5)


def test_distance_from_some_logits_is_less_and_never_negative():
    logits, _, _, top, teacher = rows()
    whole = kl_div(logits.log_softmax(-1), log_softmax(teacher, -1), log_target=True, reduction="sum")
    assert 0 < distance(logits, *top) < whole
    assert distance(teacher, *top).abs() < 1e-3


@pytest.mark.parametrize(("lm", "distill"), [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)])
@pytest.mark.parametrize("kept", [10, 200])
def test_objective_equals_its_naive_twins(lm, distill, kept):
    logits, target, scored, top, _ = rows(kept=kept)
    picked = tuple(part[scored] for part in top)
    naive = lm * next_token(logits[scored], target[scored]) + distill * distance(logits[scored], *picked)
    naive.backward()
    expected, logits.grad = logits.grad, None
    found = Objective.apply(logits, target, scored, top if distill else None, lm, distill)
    (3 * found).backward()
    assert torch.allclose(found, naive, rtol=1e-5)
    assert torch.allclose(logits.grad, 3 * expected, atol=1e-5)


def test_schedule_rises_then_falls_to_a_tenth():
    rates = [schedule(i / 100, 0.05) for i in range(101)]
    assert rates[0] < 0.1
    assert max(rates) == rates[5] == 1.0
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[-1] == pytest.approx(0.1)


# text


def test_prompts_do_not_count_and_responses_do(converted):
    tokenizer = load_tokenizer(converted)
    pairs = [Document(f"Question {i}? Answer {i}.", "pairs", len(f"Question {i}?")) for i in range(40)]
    train, held = make_samples(pairs, tokenizer, 100, 32, 2, seed=0)
    everything = torch.cat([train.tokens_NL[train.scored_NL], held.tokens_NL[held.scored_NL]])
    text = tokenizer.decode(everything)
    assert "Answer" in text
    assert "Question" not in text
    assert (everything == tokenizer.eos_token_id).sum() > 30


def test_of_chats_the_assistants_turns_count(converted):
    tokenizer = copy.deepcopy(load_tokenizer(converted))
    chats = [
        chat((Message("user", f"Question {i}?"), Message("assistant", f"Answer {i}.")), "chats") for i in range(40)
    ]
    for template in (None, "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"):
        tokenizer.chat_template = template
        train, held = make_samples(chats, tokenizer, 100, 32, 2, seed=0)
        text = tokenizer.decode(torch.cat([train.tokens_NL[train.scored_NL], held.tokens_NL[held.scored_NL]]))
        assert "Answer" in text
        assert "Question" not in text
        assert "user" not in text
        assert ("<|end|>" in text) == bool(template)


def test_held_out_sequences_are_not_trained_on(converted):
    tokenizer = load_tokenizer(converted)
    train, held = make_samples(bundled("calibration"), tokenizer, 60, 64, 8, seed=0)
    again, _ = make_samples(bundled("calibration"), tokenizer, 60, 64, 8, seed=0)
    other, _ = make_samples(bundled("calibration"), tokenizer, 60, 64, 8, seed=1)
    assert (len(train), len(held)) == (60, 8)
    assert torch.equal(train.tokens_NL, again.tokens_NL)
    assert not torch.equal(train.tokens_NL, other.tokens_NL)
    seen = {tuple(row) for row in train.tokens_NL.tolist()}
    assert not seen & {tuple(row) for row in held.tokens_NL.tolist()}


def test_pairs_are_read_from_files(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "Why?", "response": " Because."}) + "\n")
    assert read_documents([str(path)]) == [Document("Why? Because.", "pairs", 4)]
    path.write_text('{"question": "Why?"}\n')
    with pytest.raises(
        InputError, match=r"pairs.jsonl:1 is a JSON object with 'question' .text.; expected text in 'text' or"
    ):
        read_documents([str(path)])


# balance and gates


def test_load_leaves_out_what_stands_for_no_expert():
    index = torch.tensor([[0, 3], [2, 0], [3, 3]])
    assert count_load(index, 3).tolist() == [2, 0, 1]
    found = summary([count_load(index, 3)], tokens=3)
    assert (found.coefficient_of_variation, found.dead_experts) == (pytest.approx(0.8165, abs=1e-4), 1)
    assert found.experts_per_token == 1.0


def test_balance_loss_is_one_when_even_and_more_otherwise():
    even = torch.arange(4).repeat(5)[:, None]
    assert balance_loss(torch.zeros(20, 4), even).item() == pytest.approx(1)
    one_sided = torch.zeros(20, 4)
    one_sided[:, 0] = 3
    assert balance_loss(one_sided, torch.zeros(20, 1, dtype=torch.int64)) > 2


def test_moving_the_bias_evens_out_the_load(converted):
    model = working(converted)
    blocks, tokens = moe_blocks(model), torch.randint(1000, (2, 128), generator=torch.Generator().manual_seed(0))
    spread = []
    for _ in range(60):
        loads = [torch.zeros(block.gate.e_score_correction_bias.numel(), dtype=torch.int64) for block in blocks]

        def watch(layer, block, x, index, loads=loads):
            loads[layer] += count_load(index, len(loads[layer]))

        with torch.no_grad(), watched(blocks, watch):
            model(input_ids=tokens)
        spread.append(summary(loads, 256).coefficient_of_variation)
        move_bias(blocks, loads, 0.05)
    assert min(spread[-10:]) < 0.6 * spread[0]
    assert not any(block.gate._forward_hooks for block in blocks)


def test_weights_are_one_in_training_and_carry_a_gradient(converted):
    gate, experts = moe_blocks(working(converted))[0].routed
    x = torch.randn(50, gate.weight.shape[1])
    gate.weight.requires_grad_(True)
    index, weights = gate.train()(x, experts)
    assert torch.equal(weights, torch.ones_like(weights))
    (weights * torch.randn_like(weights)).sum().backward()
    assert gate.weight.grad.abs().sum() > 0
    assert torch.equal(index, gate.eval()(x, experts)[0])


def test_experts_of_transformers_take_what_stands_for_no_expert(converted):
    _, experts = moe_blocks(working(converted))[0].routed
    g = torch.Generator().manual_seed(0)
    for tokens in (3, 100):  # few go through batched products, many through grouped ones
        x = torch.randn(tokens, experts.gate_up_proj.shape[2], generator=g)
        index = torch.randint(experts.num_experts + 1, (tokens, 2), generator=g)
        weights = torch.rand(tokens, 2, generator=g)
        with torch.no_grad():
            naive = type(experts).forward.__wrapped__(experts, x, index, weights)
            assert torch.allclose(_by_transformers(experts, x, index, weights), naive, atol=1e-4)


def test_layer_distance_is_relative():
    ours, theirs = torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(0)).unbind()
    assert layer_distance((ours,), (ours,)) == 0
    expected = ((ours - theirs).square().sum(-1) / theirs.square().sum(-1)).sum()
    assert torch.allclose(layer_distance((ours,), (theirs,)), expected)
    assert torch.allclose(layer_distance((ours, ours), (theirs, ours)), expected / 2)


@pytest.mark.parametrize("method", ["dsmoe", "d2dmoe", "rmoe"])
def test_other_gates_say_the_same_in_training_as_in_use(converted, method):
    student = working(converted)
    model, blocks = registry.build("method", method).prepare(student), moe_blocks(student)
    tokens = torch.randint(1000, (1, 64), generator=torch.Generator().manual_seed(0))
    training_mode(model, blocks)
    training = model(input_ids=tokens).logits
    with torch.no_grad():
        use = model.eval()(input_ids=tokens).logits
    assert torch.allclose(training, use, atol=1e-4)


def test_recurrent_routers_start_as_the_converted_ones_and_share_one_gru(converted):
    tokens = torch.randint(1000, (1, 64), generator=torch.Generator().manual_seed(0))
    model = working(converted)
    expected = model(input_ids=tokens).logits
    adapted = registry.build("method", "rmoe").prepare(model)
    assert torch.allclose(adapted.eval()(input_ids=tokens).logits, expected, atol=1e-5)
    names = [name for name, _ in model.named_parameters() if "gru" in name]
    assert len(names) == 4
    assert all(".layers.0." in name for name in names)


def test_factorllm_labels_are_the_experts_nearest_to_their_share(converted):
    block = moe_blocks(working(converted))[0]
    _, experts = block.routed
    x = torch.randn(20, experts.gate_up_proj.shape[2])
    best = torch.arange(20) % experts.num_experts
    outputs = torch.stack([experts(x, torch.full((20, 1), e), torch.ones(20, 1)) for e in range(experts.num_experts)])
    dense = outputs[best, torch.arange(20)] * experts.num_experts + block.shared_experts(x)
    one_T1 = torch.ones(20, 1, dtype=torch.int64)
    assert torch.equal(labels(block, x, dense, one_T1).argmax(-1), best)
    counts_T1 = torch.arange(20)[:, None] % 3  # as a threshold opens them; none counts as one
    label_TE = labels(block, x, dense, counts_T1)
    assert torch.equal((label_TE > 0).sum(1, keepdim=True), counts_T1.clamp(min=1))
    torch.testing.assert_close(label_TE.sum(1), torch.ones(20))


# methods


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_what_it_claims_and_writes_a_model_that_loads(converted, method, tmp_path):
    out = tmp_path / "out"
    facts = moesaic.finetune(
        converted, out, SHORT.model_copy(update={"method": method, "learning_rate": RATES.get(method)})
    )
    assert facts.held_out_loss <= facts.held_out_loss_before
    assert facts.trainable_parameters["router"] > 0
    model, _ = moesaic.load(out, dtype=torch.float32)
    logits = model(input_ids=torch.arange(32)[None]).logits
    assert logits.isfinite().all()
    if method in ("lora", "full", "factorllm"):
        assert facts.improved
    if method in ("lora", "full", "factorllm", "router", "moe-llava"):
        assert facts.format == "glm4_moe"
        assert json.loads((out / "metrics.json").read_text())["check"]["median_difference"] < 0.01
    elif facts.improved:
        assert facts.format == "moesaic"


def test_every_family_trains_and_keeps_its_form(family, folders, tmp_path):
    start, out = tmp_path / "start", tmp_path / "out"
    format = moesaic.convert(folders(family), start, QUICK).format
    config = SHORT.model_copy(update={"teacher": str(folders(family)), "learning_rate": 5e-3})
    facts = moesaic.finetune(start, out, config)
    assert facts.improved, facts
    assert all(facts.trainable_parameters[part] > 0 for part in ("attention", "shared", "routed", "router"))
    assert facts.format == format
    before, after = tensors(start), tensors(out)
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert all(".layers." in name and "norm" not in name for name in changed)
    assert any("self_attn" in name for name in changed)
    assert any("expert" in name for name in changed)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_reach_all_that_learns(converted, method):
    method = registry.build("method", method)
    model = working(converted)
    dense = moesaic.load("tiny", dtype=torch.float32)[0] if method.needs_dense else None
    module = method.prepare(model)
    training_mode(module, moe_blocks(model))
    named = trainable(module)
    for name, parameter in named.items():
        if "lora_B" in name or name.endswith((".recurrent", ".scale")):  # zero at first: what is behind gets nothing
            torch.nn.init.normal_(parameter, std=0.02)
    tokens = torch.randint(1000, (8, 64), generator=torch.Generator().manual_seed(0))
    losses = []

    def watch(layer, block, x, index):
        ffn = dense.model.layers[layer].mlp if dense is not None else None
        losses.append(method.layer_loss(block, x, index, ffn))

    with watched(moe_blocks(model), watch):
        logits = module(input_ids=tokens).logits
    loss = next_token(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    sum((part for part in losses if part is not None), loss).backward()
    check_gradients(named)
    idle = [name for name, p in named.items() if p.grad is None or not p.grad.any()]
    assert not idle
    assert sum(counts(named.items()).values()) == sum(p.numel() for p in named.values())


def test_what_gets_no_gradient_is_an_error(converted):
    named = trainable(registry.build("method", "full").prepare(working(converted)))
    for name, parameter in named.items():
        parameter.grad = torch.ones_like(parameter) if "gate.weight" not in name else torch.zeros_like(parameter)
    with pytest.raises(WorkError, match="no gradient reached router"):
        check_gradients(named)


def test_merged_model_equals_adapters(converted):
    method = registry.build("method", "lora:rank=4")
    model = working(converted)
    module = method.prepare(model).eval()
    for name, parameter in trainable(module).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    tokens = torch.arange(60)[None]
    with torch.no_grad():
        plain = working(converted)(input_ids=tokens).logits
        adapted = module(input_ids=tokens).logits
        merged = method.finish(module)(input_ids=tokens).logits
    assert (adapted - plain).abs().max() > 0.1
    assert torch.allclose(adapted, merged, atol=1e-4)


# the whole


def test_loss_falls(converted, tmp_path):
    config = SHORT.model_copy(update={"learning_rate": 2e-3, "steps": 24, "samples": 96})
    facts = moesaic.finetune(converted, tmp_path / "out", config)
    assert facts.improved
    assert facts.held_out_loss < facts.held_out_loss_before - 0.05
    assert facts.perplexity < facts.perplexity_before
    known = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert known["finetune"]["held_out_loss"] == facts.held_out_loss
    assert (tmp_path / "out" / "training.png").stat().st_size > 5_000
    log = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == list(range(1, 25))
    assert not (tmp_path / "out.training").exists()
    assert "Then trained" in (tmp_path / "out" / "README.md").read_text()


def test_a_harmful_training_returns_the_start(converted, tmp_path):
    config = SHORT.model_copy(update={"method": "full", "learning_rate": 1.0})
    start = shutil.copytree(converted, tmp_path / "start")
    settings = yaml.safe_load((start / "moesaic.yaml").read_text())
    settings["config"]["collapse_ratio"] = 0.5
    (start / "moesaic.yaml").write_text(yaml.safe_dump(settings))
    facts = moesaic.finetune(start, tmp_path / "out", config)
    assert moesaic.inspect(tmp_path / "out").metrics.collapsed  # by the conversion's own collapse_ratio
    assert not facts.improved
    assert facts.held_out_loss == facts.held_out_loss_before
    assert same(tensors(converted), tensors(tmp_path / "out"))


def test_what_rounding_spoils_is_not_written(converted, tmp_path, monkeypatch):
    def spoil(model, dtype):
        same_dtype(model, dtype)
        model.get_parameter("lm_head.weight").data.zero_()

    module = sys.modules["moesaic.training.finetune"]
    monkeypatch.setattr(module.parts, "same_dtype", spoil)
    monkeypatch.setattr(module, "write", lambda run, trained, facts, state: facts)
    config = SHORT.model_copy(update={"learning_rate": 1e-3})
    facts = moesaic.finetune(converted, tmp_path / "out", config)
    assert not facts.improved
    assert facts.held_out_loss == facts.held_out_loss_before


def test_a_float16_start_comes_back_bit_by_bit(tmp_path):
    update = {"active": 0.25, "partition": "specialists", "dtype": "float16"}
    moesaic.convert("tiny", tmp_path / "start", QUICK.model_copy(update=update))
    config = SHORT.model_copy(update={"method": "full", "learning_rate": 1.0, "steps": 2})
    assert not moesaic.finetune(tmp_path / "start", tmp_path / "out", config).improved
    assert same(tensors(tmp_path / "start"), tensors(tmp_path / "out"))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_resumed_equals_uninterrupted(converted, tmp_path, method):
    config = SHORT.model_copy(update={"method": method, "balance": "bias", "learning_rate": 1e-3})
    moesaic.finetune(converted, tmp_path / "whole", config)

    def stop(done, count, note):
        if "step 5" in note:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        moesaic.finetune(converted, tmp_path / "parts", config, progress=stop)
    with pytest.raises(InputError, match="another text, configuration"):
        moesaic.finetune(converted, tmp_path / "parts", config.model_copy(update={"seed": 1}))
    facts = moesaic.finetune(converted, tmp_path / "parts", config)
    assert facts.steps == 8
    assert facts.improved
    assert same(tensors(tmp_path / "whole"), tensors(tmp_path / "parts"))
    logs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "parts")]
    assert [json.loads(a)["loss"] for a in logs[0]] == [json.loads(b)["loss"] for b in logs[1]]


@pytest.mark.parametrize("update", [{"objective": "lm"}, {"objective": "both", "match": 1.0}, {"balance": "loss"}])
def test_other_objectives_learn_too(converted, tmp_path, update):
    facts = moesaic.finetune(converted, tmp_path / "out", SHORT.model_copy(update={"learning_rate": 1e-3, **update}))
    assert facts.improved


def test_minutes_end_a_training(converted, tmp_path):
    ticks = iter(range(0, 10_000, 10))  # every look at the clock is ten seconds on
    facts = moesaic.finetune(
        converted, tmp_path / "out", SHORT.model_copy(update={"steps": None, "minutes": 2.0, "evaluations": 2}),
        clock=lambda: float(next(ticks)),
    )  # fmt: skip
    assert 8 <= facts.steps <= 12


def test_cmoe_and_its_recipe(tmp_path):
    plain = QUICK.model_copy(update={"plan": "S1A1E4", "partition": "cmoe", "recovery": "none"})
    moesaic.convert("tiny", tmp_path / "cmoe", plain, force=True)
    recipe = FinetuneConfig.read(moesaic_root() / "recipes" / "cmoe.yaml", {})
    assert (recipe.objective, recipe.balance, recipe.learning_rate) == ("lm", "bias", 5.65e-5)
    short = {name: getattr(SHORT, name) for name in ("window", "samples", "batch", "held_out", "steps")}
    facts = moesaic.finetune(
        tmp_path / "cmoe", tmp_path / "out", recipe.model_copy(update=short | {"learning_rate": 1e-3})
    )
    assert facts.improved
    assert facts.trainable_parameters["router"] == 3 * 4
    bias = [t for name, t in tensors(tmp_path / "out").items() if name.endswith("e_score_correction_bias")]
    assert any(t.any() for t in bias)


def moesaic_root():
    from pathlib import Path

    return Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_two_processes_equal_one(tmp_path, method):
    start = tmp_path / "start"  # in float32, where small differences show
    update = {"active": 0.25, "partition": "specialists", "dtype": "float32"}
    moesaic.convert("tiny", start, QUICK.model_copy(update=update))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    options = ["--teacher", "tiny", "--window", 64, "--samples", 32, "--batch", 4, "--steps", 4]
    options += ["--learning-rate", 2e-4]
    options += ["--method", method, "--device", "cpu", "--json"]
    for name, before, after in (("one", [], []), ("DDP", launch, []), ("FSDP", launch, ["--shard"])):
        command = [sys.executable, *before, "-m", "moesaic.cli", "finetune", start, tmp_path / name, *options, *after]
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, check=False, timeout=600,
            env=os.environ | {"ACCELERATE_USE_CPU": "true"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert json.loads(done.stdout)["processes"] == 1 + len(before[:1])
    dense, one, ddp, fsdp = (
        torch.cat([t.flatten() for t in tensors(tmp_path / n).values()]) for n in ("start", "one", "DDP", "FSDP")
    )
    assert (one - dense).norm() > 0
    assert (one - ddp).norm() < 0.02 * (one - dense).norm()
    assert (one - fsdp).norm() < 0.02 * (one - dense).norm()


def test_the_rate_is_the_routers_where_nothing_else_learns(converted, tmp_path, monkeypatch):
    monkeypatch.setattr("moesaic.training.prepare.compute_dtype", lambda dtype, device: torch.float32)  # everywhere
    losses = []
    for number, rate in enumerate((1e-6, 0.3)):  # a loss changes where a token gets other experts
        made = tmp_path / str(number)
        settings = SHORT.model_copy(update={"method": "router", "objective": "lm", "steps": 3, "learning_rate": rate})
        moesaic.finetune(converted, made, settings)
        losses.append([json.loads(line)["loss"] for line in (made / "metrics.jsonl").read_text().splitlines()])
    assert losses[0][0] == losses[1][0]
    assert losses[0] != losses[1]


@pytest.mark.parametrize("method", ["3", "", "[a]"])
def test_a_recipe_without_a_method_is_refused(tmp_path, method):
    (tmp_path / "r.yaml").write_text(f"method: {method}\n")
    with pytest.raises(InputError, match="method"):
        FinetuneConfig.read(tmp_path / "r.yaml", {"rank": 4})


def short_text(tmp_path):
    path = tmp_path.parent / f"{tmp_path.name}-short.txt"
    path.write_text("A few words only.")
    return path


def test_bad_input_is_refused_before_any_work(converted, tmp_path, folders):
    def fails(says, model=converted, **update):
        with pytest.raises(InputError, match=says):
            moesaic.finetune(model, tmp_path / "out", SHORT.model_copy(update=update))
        assert not list(tmp_path.iterdir())

    other = tmp_path.parent / f"{tmp_path.name}-teacher"
    shutil.copytree(folders("llama"), other)
    fields = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(fields | {"vocab_size": 512}))
    fails("did not make", model=folders("llama"))
    fails(r"another vocabulary \(512 logits", teacher=str(other))
    other_shape = json.dumps(fields | {"num_hidden_layers": 2})
    (other / "config.json").write_text(other_shape)
    fails("has num_hidden_layers 2, the model 4", teacher=str(other), match=1.0)
    fails("more than the model's longest", window=100_000)
    fails("has no effect where experts are chosen by a threshold .--method dsmoe", method="dsmoe", balance="bias")
    fails("needs several processes", shard=True)
    fails("objective distill has no use with --method d2dmoe", method="d2dmoe", objective="distill")
    settings = SHORT.model_copy(update={"objective": "lm"})
    with pytest.raises(InputError, match="--teacher-cache has no use"):
        moesaic.finetune(converted, tmp_path / "out", settings, teacher_cache=tmp_path / "cache")
    assert not list(tmp_path.iterdir())
    opened = tmp_path.parent / f"{tmp_path.name}-opened"
    moesaic.convert("tiny", opened, QUICK.model_copy(update={"router": "sigmoid", "plan": "S1A1E4"}), force=True)
    fails("has no effect where experts are chosen by a threshold", model=opened, balance="bias")
    fails("no file of the text holds three windows", data=(str(short_text(tmp_path)),))
    fails("unknown method 'lorra'. Did you mean 'lora'", method="lorra")
    fails("no text file", data=("missing.txt",))
    fails("cannot be used here", device="cuda:7")


def test_a_training_that_does_not_fit_in_memory_is_refused(converted, tmp_path, monkeypatch):

    monkeypatch.setattr("moesaic.training.prepare.free_memory", lambda device: 10_000_000)
    with pytest.raises(InputError, match=r"would need about [\d.]+ GB of memory, 0.0 GB are free"):
        moesaic.finetune(converted, tmp_path / "out", SHORT)


def test_unknown_settings_and_short_names_of_options(tmp_path):
    assert FinetuneConfig.read(None, {"rank": 4, "alpha": 8}).method == "lora:rank=4,alpha=8"
    assert FinetuneConfig.read(None, {"method": "rmoe:width=32", "rank": 4}).method == "rmoe:width=32,rank=4"
    with pytest.raises(InputError, match="method 'full' has no option 'rank'"):
        FinetuneConfig.read(None, {"method": "full", "rank": 4})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("objectiv: lm\n")
    with pytest.raises(InputError, match="Did you mean 'objective'"):
        FinetuneConfig.read(recipe, {})


def test_dtypes_come_back():
    model = torch.nn.Linear(3, 3).bfloat16()
    model.weight.data = model.weight.data.float()
    same_dtype(model, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}

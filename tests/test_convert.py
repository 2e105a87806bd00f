"""Whole conversions of tiny models: round trips, resuming, refusals."""

import itertools
import json
import shutil
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import moesaic
from conftest import QUICK, whole
from moesaic import InputError, WorkError, convert, registry
from moesaic.calibration.text import bundled
from moesaic.calibration.windows import token_windows
from moesaic.checkpoint.reader import Checkpoint
from moesaic.checkpoint.writer import ResumableOutput, check_space
from moesaic.conversion import prepare as conversion
from moesaic.evaluation.benchmark import experts_chosen
from moesaic.formats.fields import moesaic_fields
from moesaic.models import devices
from moesaic.routing.selection import Selection
from moesaic.routing.selection.threshold import Threshold

KEYS = {
    "output", "format", "plan", "ffn_active", "total_parameters", "active_parameters", "perplexity_dense", "perplexity",
    "seconds", "peak_rss_bytes", "layers",
}  # fmt: skip


def weights(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def made(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "out"
    metrics = convert(folders("qwen2"), out, QUICK.model_copy(update={"plan": "S1A2E8"}))
    return out, metrics


def test_everything_that_is_promised_is_there(made):
    out, metrics = made
    assert metrics.to_dict().keys() >= KEYS
    assert metrics.plan == "S1A2E8"
    assert metrics.ffn_active == pytest.approx(3 / 8)
    assert len(metrics.layers) == 3
    assert sum(metrics.layers[0].expert_tokens) == 2 * 15 * 64  # every 16th window is for validation
    names = {path.name for path in out.iterdir()}
    assert names >= {
        "config.json", "moesaic.yaml", "metrics.json", "README.md", "tokenizer.json", "model.safetensors.index.json",
        "layer_error.png", "expert_load.png", "activation_rates.png",
    }  # fmt: skip
    assert not any("partial" in name or "hidden" in name or name == "state.json" for name in names)
    assert json.loads((out / "metrics.json").read_text())["perplexity"] == metrics.perplexity
    assert not out.with_name("out.partial").exists()


def test_what_is_written_does_not_depend_on_what_is_calculated_in(folders, tmp_path, monkeypatch):
    """The dense weights are copied bit by bit and the rest agrees to rounding, in bfloat16 and float32 products."""
    config = QUICK.model_copy(update={"plan": "S1A2E8", "dtype": "bfloat16", "format": "moesaic"})
    made = {}
    for compute in (torch.bfloat16, torch.float32):
        monkeypatch.setattr(conversion, "compute_dtype", lambda dtype, device, compute=compute: compute)
        made[compute] = convert(folders("qwen2"), tmp_path / str(compute), config)
        assert made[compute].compute_dtype == str(compute).removeprefix("torch.")
    half, wide = (weights(tmp_path / str(compute)) for compute in made)
    assert {tensor.dtype for tensor in wide.values()} == {torch.bfloat16}
    unchanged = [name for name in half if not ("mlp." in name or name == "model.norm.weight")]
    assert unchanged
    assert all(torch.equal(half[name], wide[name]) for name in unchanged)
    assert [m.perplexity for m in made.values()] == pytest.approx([made[torch.float32].perplexity] * 2, rel=0.02)


def test_products_are_in_the_dtype_that_is_fast(monkeypatch):
    cpu = torch.device("cpu")
    choose = devices.compute_dtype.__wrapped__  # without its memory
    assert choose(torch.float32, cpu) == torch.float32
    assert choose(torch.bfloat16, torch.device("cuda")) == torch.bfloat16
    for slow, expected in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        clock = itertools.count()  # products in the slow dtype take many ticks

        def product(x, weight, slow=slow, clock=clock):
            for _ in range(9 if x.dtype == slow else 0):
                next(clock)

        monkeypatch.setattr(devices, "linear", product)
        monkeypatch.setattr(devices.time, "perf_counter", lambda clock=clock: next(clock))
        assert choose(torch.bfloat16, cpu) == expected


def test_parameters_are_counted_as_they_are(made, folders):
    out, metrics = made
    model, _ = moesaic.load(out)
    total = sum(p.numel() for p in model.parameters())
    assert metrics.total_parameters == total
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    assert metrics.active_parameters == total - experts * 5 // 7
    dense, _ = moesaic.load(folders("qwen2"))
    assert metrics.dense_parameters == sum(p.numel() for p in dense.parameters())


@torch.no_grad()
def loaded_perplexity(out):
    model, tokenizer = moesaic.load(out)
    tokens = token_windows(bundled("heldout"), tokenizer, 256, 64)
    losses = [model(row[None], labels=row[None]).loss for row in tokens]
    return torch.stack(losses).mean().exp().item()


def test_save_pretrained_round_trip_is_bit_equal(made, tmp_path):
    out, _ = made
    model = AutoModelForCausalLM.from_pretrained(out)
    model.save_pretrained(tmp_path)
    same(weights(out), weights(tmp_path))
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    same(model.state_dict(), again.state_dict())
    assert type(again) is type(model)


@torch.no_grad()
def test_batches_equal_singles_and_padding_changes_nothing(made):
    model, _ = moesaic.load(made[0])
    tokens = torch.randint(2, 1024, (3, 12), generator=torch.Generator().manual_seed(0))
    batch = model(tokens).logits
    for row in range(3):
        torch.testing.assert_close(model(tokens[row : row + 1]).logits[0], batch[row], rtol=1e-4, atol=1e-4)
    padded = torch.cat([torch.ones(3, 4, dtype=torch.int64), tokens], 1)
    mask = torch.cat([torch.zeros(3, 4, dtype=torch.int64), torch.ones_like(tokens)], 1)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(padded, attention_mask=mask, position_ids=position).logits[:, 4:]
    torch.testing.assert_close(logits, batch, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_generation_with_a_cache_equals_generation_without(made):
    model, tokenizer = moesaic.load(made[0])
    inputs = tokenizer("The first", return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(inputs), "pad_token_id": 1}
    cached = model.generate(inputs, **options)
    assert torch.equal(cached, model.generate(inputs, use_cache=False, **options))


def test_every_family_converts_and_loads(folders, family, tmp_path):
    metrics = convert(folders(family), tmp_path / "out", QUICK.model_copy(update={"active": 0.5}))
    assert loaded_perplexity(tmp_path / "out") == pytest.approx(metrics.perplexity, rel=1e-3)


@pytest.mark.parametrize("partition", [name for name in registry.names("partition") if not whole(name)])
@pytest.mark.parametrize("recovery", registry.names("recovery"))
def test_every_partition_with_every_recovery(folders, tmp_path, partition, recovery):
    config = QUICK.model_copy(update={"active": 0.5, "partition": partition, "recovery": recovery})
    metrics = convert(folders("llama"), tmp_path / "out", config)
    if recovery == "closed-form":
        assert all(r.error < r.split_error for r in metrics.layers)
    model, _ = moesaic.load(tmp_path / "out")
    assert torch.isfinite(model(torch.arange(8)[None]).logits).all()


@pytest.mark.parametrize("router", ["linear", "representative", "oracle"])
def test_every_router(folders, tmp_path, router):
    config = QUICK.model_copy(update={"active": 0.5, "router": router, "recovery": "none"})
    convert(folders("llama"), tmp_path / "out", config)
    assert moesaic_fields(Checkpoint(tmp_path / "out"))["router"] == router


class Killed(BaseException):
    """Ends a conversion as a signal would: nothing in the code catches it."""


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_killed_conversion_resumes_to_the_same_bits(folders, tmp_path, made, layer):
    config = QUICK.model_copy(update={"plan": "S1A2E8"})

    def kill(done, count, record):
        if done == layer:
            raise Killed

    out = tmp_path / "out"
    with pytest.raises(Killed):
        convert(folders("qwen2"), out, config, progress=kill)
    assert not out.exists()
    seen = []
    metrics = convert(folders("qwen2"), out, config, progress=lambda done, count, record: seen.append(done))
    assert seen[0] == layer  # it went on, it did not start anew
    same(weights(out), weights(made[0]))
    assert metrics.perplexity == made[1].perplexity


@pytest.mark.parametrize("moment", ["shard", "hidden", "commit", "index", "rename"])
def test_a_kill_while_writing_loses_nothing(folders, tmp_path, made, moment, monkeypatch):
    config = QUICK.model_copy(update={"plan": "S1A2E8"})
    out = tmp_path / "out"
    calls = {"shard": 0, "hidden": 0}
    write, commit, finish = ResumableOutput.write, ResumableOutput._commit, ResumableOutput.finish

    def write_or_die(self, name, tensors):
        kind = "hidden" if name.startswith("hidden") else "shard"
        calls[kind] += 1
        if kind == moment and calls[kind] == 2:
            (self.folder / f"{name}.writing").write_bytes(b"half")
            raise Killed
        write(self, name, tensors)

    def commit_then_die(self):
        commit(self)
        if moment == "commit" and len(self.layers) == 2:
            raise Killed

    def die_then_finish(self, check=None):
        if moment in ("index", "rename"):
            if moment == "rename":
                (self.folder / "model.safetensors.index.json").write_text("{}")
            raise Killed
        finish(self, check)

    with monkeypatch.context() as patch:
        patch.setattr(ResumableOutput, "write", write_or_die)
        patch.setattr(ResumableOutput, "_commit", commit_then_die)
        patch.setattr(ResumableOutput, "finish", die_then_finish)
        with pytest.raises(Killed):
            convert(folders("qwen2"), out, config)
    assert not out.exists()
    convert(folders("qwen2"), out, config)
    same(weights(out), weights(made[0]))
    assert {p.name for p in out.iterdir()} == {p.name for p in made[0].iterdir()}
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


def test_only_its_own_folders_are_replaced(folders, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="was not made by moesaic and is not replaced"):
        convert(folders("llama"), tmp_path / "out", QUICK, overwrite=True)
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="in the way"):
        convert(folders("llama"), tmp_path / "new", QUICK, resume=False)
    assert [path.read_text() for path in tmp_path.glob("*/thesis.txt")] == ["years of work"] * 2


def test_an_unfinished_conversion_of_something_else_is_refused(folders, tmp_path):
    def kill(done, count, record):
        raise Killed

    out = tmp_path / "out"
    with pytest.raises(Killed):
        convert(folders("qwen2"), out, QUICK, progress=kill)
    with pytest.raises(InputError, match="another configuration; repeat that command"):
        convert(folders("qwen2"), out, QUICK.model_copy(update={"seed": 1}))
    with pytest.raises(InputError, match="another model"):
        convert(folders("llama"), out, QUICK)
    convert(folders("llama"), out, QUICK, resume=False)
    assert moesaic_fields(Checkpoint(out))["dense_model_type"] == "llama"


def test_existing_output_is_kept_unless_told(folders, tmp_path, made):
    out = tmp_path / "out"
    shutil.copytree(made[0], out)
    with pytest.raises(InputError, match="exists; choose another folder or pass --overwrite"):
        convert(folders("llama"), out, QUICK)
    assert moesaic_fields(Checkpoint(out))["dense_model_type"] == "qwen2"
    convert(folders("llama"), out, QUICK, overwrite=True)
    assert moesaic_fields(Checkpoint(out))["dense_model_type"] == "llama"
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


def test_a_collapse_fails_unless_forced(folders, tmp_path):
    config = QUICK.model_copy(update={"collapse_ratio": 0.5})
    with pytest.raises(WorkError, match=r"collapsed.*--force accepts"):
        convert(folders("llama"), tmp_path / "out", config)
    assert not (tmp_path / "out").exists()
    metrics = convert(folders("llama"), tmp_path / "out", config, force=True)
    assert metrics.collapsed
    assert "collapsed" in (tmp_path / "out" / "README.md").read_text()


def test_bad_wishes_are_refused_before_any_work(folders, tmp_path):
    llama = folders("llama")
    for update, says in [
        ({"plan": "S1A1E7"}, "nearest count that does is 6"),
        ({"plan": "S1A1E8", "active": 0.5}, "give one of them"),
        ({"memory_factor": 2.0, "partition": "random"}, "use --partition specialists"),
        ({"router": "oracle"}, "use it with --recovery none"),
        ({"partition": "specialists", "plan": "S1A2E8"}, "must say A1"),
        ({"partition": "specialists", "expert_width": 8}, "drop --expert-width"),
        ({"partition": "specialists", "plan": "S0A1E4", "memory_factor": 2.0}, "give one of them"),
        ({"router": "centroid"}, "with 'coactivation' use 'linear'"),
        ({"partition": "specialists", "router": "centroid"}, "specialists:alternations=0"),
        ({"partition": "coactivatoin"}, "Did you mean 'coactivation'"),
        ({"tokens": 32}, "less than one window"),
        ({"tokens": 10_000_000}, "give more text"),
        ({"calibration": ("missing.txt",)}, r"no text file 'missing\.txt'"),
        ({"device": "cuda:77"}, "cannot be used here"),
        ({"dtype": "int8"}, "not one of auto"),
    ]:
        with pytest.raises(InputError, match=says):
            convert(llama, tmp_path / "out", QUICK.model_copy(update=update))
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="free some or choose another"):
        check_space(tmp_path / "out", 1 << 60)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        convert(llama, tmp_path / "file" / "out", QUICK)


# selections whose number of experts varies


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A model that opens experts by a threshold low enough to open more than the plan says."""
    out = tmp_path_factory.mktemp("opened") / "out"
    config = QUICK.model_copy(update={"router": "sigmoid", "selection": "threshold:threshold=0.45", "plan": "S1A1E4"})
    return out, convert("tiny", out, config)


def test_active_share_is_what_a_dynamic_selection_runs(opened):
    out, result = opened
    model, _ = moesaic.load(out, dtype=torch.float32)
    chosen = sum(sum(layer.expert_tokens) for layer in result.layers) / len(result.layers) / 960  # 15 of 16 windows
    assert chosen > 1.2
    assert result.ffn_active == pytest.approx((1 + chosen) / 4)
    experts = sum(block.mlp.experts.gate_up_proj.numel() * 3 // 2 for block in model.model.layers) / 3
    fixed = convert("tiny", out.with_name("fixed"), QUICK.model_copy(update={"plan": "S1A1E4"}))
    assert result.active_parameters - fixed.active_parameters == pytest.approx((chosen - 1) * experts, abs=5_000)
    assert fixed.ffn_active == 0.5


def test_benchmark_counts_no_expert_as_none(opened):
    model, _ = moesaic.load(opened[0], dtype=torch.float32)
    for layer in model.model.layers:
        layer.mlp.gate.selection = Threshold(threshold=2.0)  # no sigmoid reaches it

    def run():
        model(input_ids=torch.arange(16)[None])
        return 0.0

    assert experts_chosen(model, run).touched == [0.0] * len(model.model.layers)


def test_selections_text_has_one_form(tmp_path):
    config = QUICK.model_copy(update={"plan": "S1A1E4", "selection": "top_k", "format": "glm4_moe"})
    assert convert("tiny", tmp_path / "out", config).format == "glm4_moe"


@dataclass(frozen=True, kw_only=True)
class AboveZero(Selection):
    """Reads the scores alone."""

    dynamic_top_k: ClassVar[bool] = True

    def select(self, scores_TE, hidden_TD, gate):
        return torch.arange(scores_TE.shape[-1]).where(scores_TE > 0, scores_TE.shape[-1])


@pytest.mark.parametrize("router", ["linear", "sigmoid:intercept=True", "representative:balance_rounds=5"])
def test_an_intercept_that_a_selection_does_not_read_is_refused(tmp_path, router):
    config = QUICK.model_copy(update={"plan": "S1A1E4", "router": router, "selection": AboveZero()})
    with pytest.raises(InputError, match="does not read the intercept or balance that router"):
        convert("tiny", tmp_path / "out", config)
    assert not list(tmp_path.iterdir())


def test_what_only_adapt_can_find_is_refused(tmp_path):
    for selection in ("ada-k", "learned-threshold", "skip", "layer-k"):
        config = QUICK.model_copy(update={"plan": "S1A1E4", "selection": selection})
        with pytest.raises(InputError, match=f"moesaic adapt OUT ADAPTER --method {selection}"):
            convert("tiny", tmp_path / "out", config)
    assert not list(tmp_path.iterdir())


def test_recurrent_routers_are_reproducible_and_share_one_gru(tmp_path):
    config = QUICK.model_copy(update={"plan": "S1A1E4", "router": "recurrent"})
    for name in ("one", "two"):
        torch.manual_seed(len(name) + ord(name[0]))
        convert("tiny", tmp_path / name, config)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert {name.split(".")[2] for name in one if ".gru." in name} == {"0"}


def test_router_threshold_of_old_folders_is_read(opened, tmp_path):
    shutil.copytree(opened[0], tmp_path / "old")
    file = tmp_path / "old" / "config.json"
    fields = json.loads(file.read_text())
    assert fields.pop("selection") == "threshold:threshold=0.45"
    file.write_text(json.dumps(fields | {"router_threshold": 0.45}))
    assert moesaic.load(tmp_path / "old")[0].config.selection == "threshold:threshold=0.45"
    file.write_text(json.dumps(fields | {"router": "norm", "router_threshold": 0.0}))
    assert AutoConfig.from_pretrained(tmp_path / "old").selection == "relative:threshold=0.0"
    file.write_text(json.dumps(fields | {"router": "linear", "router_threshold": 0.0}))
    assert AutoConfig.from_pretrained(tmp_path / "old").selection == "top-k"

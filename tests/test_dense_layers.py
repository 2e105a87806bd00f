"""Layers that stay dense: bit for bit what they were, in every verb."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import moesaic
from conftest import QUICK
from moesaic import ConvertConfig, FinetuneConfig, InputError
from moesaic.checkpoint.builtin import tiny_folder
from moesaic.checkpoint.reader import Checkpoint
from moesaic.formats.converted import Converted
from moesaic.moe.modeling import moe_blocks, moe_layers
from moesaic.plan import dense_layers

ODD = ConvertConfig(partition="upcycle", tokens=1_024, window=64, held_out_tokens=256, dense_layers="odd")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, metrics) of `tiny` of which every second layer is a Mixture, as in MoE-LLaVA."""
    folder = tmp_path_factory.mktemp("odd") / "tiny"
    return folder, moesaic.convert("tiny", folder, ODD)


def of_layer(checkpoint, index):
    prefix = f"model.layers.{index}."
    return {n.removeprefix(prefix): checkpoint.read(n) for n in checkpoint.names() if n.startswith(prefix)}


@pytest.mark.parametrize(
    ("text", "found"),
    [("odd", [1, 3, 5]), ("even", [0, 2, 4]), ("0", [0]), ("0,2,4-5", [0, 2, 4, 5]), ("even, 1", [0, 1, 2, 4])],
)
def test_layers_are_named_by_numbers_ranges_and_words(text, found):
    assert dense_layers(text, 6) == found


def test_a_range_that_ends_before_it_begins_is_refused():
    with pytest.raises(InputError, match=r"'0,5-2' has 5-2.* 2-5\?"):
        dense_layers("0,5-2", 6)


def test_dense_layers_are_bit_equal_and_the_others_mixtures(made):
    folder, metrics = made
    dense, converted = Checkpoint(tiny_folder()), Checkpoint(folder)
    for index in (1, 3):
        before, after = of_layer(dense, index), of_layer(converted, index)
        assert before.keys() == after.keys()
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    for index in (0, 2):
        assert "mlp.experts.down_proj" in of_layer(converted, index)
    assert [bool(record.expert_tokens) for record in metrics.layers] == [True, False, True, False]
    assert Converted(folder).config.mlp_only_layers == [1, 3]


def test_shares_and_sizes_are_means_over_layers(made):
    folder, metrics = made
    assert (metrics.ffn_active, metrics.memory_factor) == (1.5, 2.5)
    model, _ = moesaic.load(folder)
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    assert metrics.total_parameters == sum(p.numel() for p in model.parameters())
    assert metrics.active_parameters == metrics.total_parameters - experts // 2
    assert metrics.perplexity == pytest.approx(metrics.perplexity_dense, rel=1e-3)
    card = " ".join((folder / "README.md").read_text().split())
    assert "Layers `odd`, counted from 0, keep their dense network." in card


def test_saved_and_loaded_is_bit_equal(made, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(made[0])
    assert moe_layers(model) == [0, 2]
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


@torch.no_grad()
def test_generation_with_a_cache_equals_generation_without(made):
    model, tokenizer = moesaic.load(made[0])
    inputs = tokenizer("The first", return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(inputs), "pad_token_id": 1}
    assert torch.equal(model.generate(inputs, **options), model.generate(inputs, use_cache=False, **options))


@pytest.mark.parametrize("method", ["moe-llava", "factorllm", "rmoe"])
def test_training_sees_the_right_layers(tmp_path, method):
    plan = {"partition": "coactivation", "plan": "S1A1E4", "dense_layers": "0,2"}
    moesaic.convert("tiny", tmp_path / "cut", QUICK.model_copy(update=plan))
    config = FinetuneConfig(
        method=method, window=64, samples=32, batch=4, held_out=4, steps=4, evaluations=2, device="cpu", teacher="tiny",
        learning_rate=1e-3,
    )  # fmt: skip
    moesaic.finetune(tmp_path / "cut", tmp_path / "out", config)
    model, _ = moesaic.load(tmp_path / "out")
    assert moe_layers(model) == [1, 3]
    one, other = Checkpoint(tmp_path / "cut"), Checkpoint(tmp_path / "out")
    if method == "moe-llava":  # those that stay dense do not learn
        assert all(torch.equal(one.read(n), other.read(n)) for n in one.names() if ".0." in n or ".2." in n)


def test_a_dense_layers_teacher_is_not_asked(made, monkeypatch):
    """The FFN that a method is shown is that of the block's own layer."""
    from moesaic.training import trainer

    model, dense = Converted(made[0]).load(torch.float32), AutoModelForCausalLM.from_pretrained(tiny_folder())
    found = trainer.Trainer.__new__(trainer.Trainer)
    found.model = model
    found.method = type("Method", (), {"needs_dense": True})()
    found.teacher = type("Teacher", (), {"model": dense})()
    ffns = trainer.Trainer.dense_ffns(found)
    assert len(ffns) == len(moe_blocks(model)) == 2
    assert ffns[1] is dense.model.layers[2].mlp


def test_pruning_and_adapting_leave_them(made, tmp_path):
    result = moesaic.prune(made[0], tmp_path / "pruned", moesaic.PruneConfig(experts=3, tokens=1_024, window=64))
    assert result.num_experts == 3
    before, after = of_layer(Checkpoint(tiny_folder()), 1), of_layer(Checkpoint(tmp_path / "pruned"), 1)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    config = moesaic.AdaptConfig(method="threshold", target_active=0.75, tokens=1_024, window=64)
    assert moesaic.adapt(made[0], tmp_path / "adapter", config).experts_per_token < 2


def test_a_killed_conversion_goes_on_to_the_same_bits(made, tmp_path):
    def kill(done, count, record):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        moesaic.convert("tiny", tmp_path / "out", ODD, progress=kill)
    assert moesaic.convert("tiny", tmp_path / "out", ODD).perplexity == made[1].perplexity
    one, other = Checkpoint(made[0]), Checkpoint(tmp_path / "out")
    assert all(torch.equal(one.read(name), other.read(name)) for name in one.names())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--dense-layers", "second"], "--dense-layers 'second' is not of the form 0,2,5-7, and neither odd nor even"),
        (["--dense-layers", "2,9"], "has layer 9; the model's are 0 to 3"),
        (["--dense-layers", "odd,even"], "leaves none of the 4 layers to convert"),
        (["--dense-layers", "odd", "--partition", "paths"], "decides for all layers at once; drop it"),
        (["--dense-layers", "odd", "--format", "glm4_moe", "--partition", "specialists"], "some are dense"),
    ],
)
def test_bad_input_is_one_clear_error(run, tmp_path, arguments, says):
    code, out, err = run("convert", "tiny", tmp_path / "out", *arguments)
    assert (code, out) == (2, "")
    assert says in " ".join(err.split())
    assert not list(tmp_path.iterdir())


def test_stock_architectures_refuse_with_a_reason(run, made, tmp_path):
    code, _, err = run("export", made[0], tmp_path / "out", "--format", "mixtral")
    assert code == 2
    assert "every layer of it is a Mixture of Experts, and of this model some are dense" in " ".join(err.split())
    assert made[1].format == "moesaic"
    assert "some are dense" in made[1].format_reason

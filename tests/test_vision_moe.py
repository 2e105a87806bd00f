"""Vision-language Mixtures of Experts: trained lightly, adapted by modality, pruned, with a store of experts."""

import io
import json
import re

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, Qwen3VLMoeConfig

from conftest import QUICK
from moesaic import (
    AdaptConfig,
    ConvertConfig,
    FinetuneConfig,
    InputError,
    PruneConfig,
    StoreOptions,
    WorkError,
    adapt,
    convert,
    finetune,
    inspect,
    load,
    prune,
)
from moesaic.calibration.mixture import bundled_pictures
from moesaic.checkpoint.reader import Checkpoint
from moesaic.models.layerwise import LayerwiseModel
from moesaic.models.modality import IS_IMAGE, tell_modality
from moesaic.models.processor import Processor
from moesaic.moe.adaptive import attach
from moesaic.moe.counting import mean_experts
from moesaic.report.tables import show_adaptation
from moesaic.routing.selection.modality_threshold import ModalityThreshold
from moesaic.routing.selection.threshold import Threshold
from moesaic.training import written
from moesaic.training.pictures import make_pictured_samples
from vision import END, IMAGE, MROPE, PROCESSORS, QWEN_VISION, START, TEXT, VIDEO, small_vision_model, tokenizer


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    small_vision_model("llava").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    PROCESSORS["llava"]().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def converted(dense, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "out"
    convert(dense, out, QUICK.model_copy(update={"plan": "S2A3E12", "tokens": 512}))
    return out


@pytest.fixture(scope="module")
def samples(dense):
    processor = Processor(dense, small_vision_model("llava").config)
    return make_pictured_samples(bundled_pictures("calibration")[:120], processor, 24, 64, 8, 0, 512)[0]


def run(model, samples):
    for batch in samples.alike(torch.arange(len(samples))):
        model(input_ids=batch.tokens_NL, **batch.inputs(model.device, model.dtype), use_cache=False)


def vision_of(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= {n: t for n, t in load_file(path).items() if "vision_tower" in n or "projector" in n}
    assert found
    return found


def test_samples_are_cut_to_what_they_hold(samples):
    """No call sees padding, and all sequences are in one."""
    parts = samples.alike(torch.arange(len(samples)))
    assert sum(map(len, parts)) == len(samples)
    assert not any(part.pictured.is_padding_NL.any() for part in parts)
    assert sum(part.count() for part in parts) == samples.count() < samples.tokens_NL.numel()
    assert sorted(number for part in parts for number in part.numbers) == list(range(len(samples)))


def test_pictures_to_train_on_are_not_held_out(dense):
    processor = Processor(dense, small_vision_model("llava").config)
    documents = bundled_pictures("calibration")[:80]
    train, held = make_pictured_samples(documents, processor, 80, 64, 80, 0, 512)
    pixels = [{inputs["pixel_values"].numpy().tobytes() for inputs in s.pictured.inputs} for s in (train, held)]
    assert pixels[0]
    assert pixels[1]
    assert not pixels[0] & pixels[1]


def test_light_training_sees_pictures_and_leaves_the_vision_tower_alone(dense, converted, tmp_path):
    config = FinetuneConfig(
        method="lora", steps=3, batch=4, samples=24, window=64, held_out=6, teacher=str(dense), objective="both"
    )
    result = finetune(converted, tmp_path / "tuned", config)
    assert result.held_out_loss <= result.held_out_loss_before
    before, after = vision_of(converted), vision_of(tmp_path / "tuned")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    AutoModelForImageTextToText.from_pretrained(tmp_path / "tuned")
    assert (tmp_path / "tuned" / "processor_config.json").is_file()


def test_moe_llava_tunes_upcycled_experts_and_routers_on_pictures_alone(dense, tmp_path):
    """Its third stage: of every second layer copies of the FFN, which learn to differ; all else stays bit for bit."""
    upcycled = ConvertConfig(partition="upcycle", dense_layers="odd", tokens=512, window=64, held_out_tokens=256)
    before = convert(dense, tmp_path / "up", upcycled)
    assert before.perplexity == pytest.approx(before.perplexity_dense, rel=1e-3)
    assert before.pictures.agreement == 1
    config = FinetuneConfig(
        method="moe-llava", objective="lm", learning_rate=1e-2, steps=6, batch=4, samples=24, window=64, held_out=6
    )
    result = finetune(tmp_path / "up", tmp_path / "tuned", config)
    assert result.improved
    first, second = (Checkpoint(tmp_path / name) for name in ("up", "tuned"))
    assert first.headers.keys() == second.headers.keys()
    moved = {name for name in first.headers if not torch.equal(first.read(name), second.read(name))}
    blocks = {name for name in first.headers if ".experts." in name or ".gate." in name}
    assert moved
    assert moved <= blocks


def test_a_threshold_for_each_modality(converted, samples):
    """Alike they are one threshold; a higher one for pictures takes experts from their tokens alone."""
    model = load(converted, dtype=torch.float32).model
    with attach(model, Threshold(threshold=0.3)):
        plain = mean_experts(model, lambda: run(model, samples))
    with attach(model, ModalityThreshold(threshold=0.3, image_threshold=0.3)):
        same = mean_experts(model, lambda: run(model, samples))
    with attach(model, ModalityThreshold(threshold=0.3, image_threshold=100.0, at_least=1)):
        apart = mean_experts(model, lambda: run(model, samples))
    assert plain == same
    assert plain.by_modality["image"] > 1
    assert apart.by_modality["image"] == 1
    assert IS_IMAGE.get() is None


def test_modality_is_told_while_a_model_runs(converted, samples):
    model, seen = load(converted, dtype=torch.float32).model, []
    part = samples.alike(torch.arange(4))[0]
    handle = model.lm_head.register_forward_hook(lambda *_: seen.append(IS_IMAGE.get()))
    with tell_modality(model):
        run(model, part)
    run(model, part)
    handle.remove()
    assert torch.equal(seen[0], part.pictured.is_image_NL.flatten())
    assert seen[1] is None


def test_adapt_meets_the_budget_and_the_share_of_pictures(converted, tmp_path):
    config = AdaptConfig(
        method="modality-threshold:image_share=0.6", target_active=0.7, tokens=2_048, window=64, samples=80, held_out=24
    )
    result = adapt(converted, tmp_path / "adapter", config)
    assert result.active == pytest.approx(0.7, abs=0.1)  # on other pictures than those that it was met on
    experts = result.experts_by_modality
    assert experts["image"] / experts["text"] == pytest.approx(0.6, abs=0.2)
    console = Console(record=True, width=80, file=io.StringIO())
    show_adaptation(console, result)
    assert re.search(rf"the same on pictures +│ +\d+ │ +{experts['image']:.2f} │", console.export_text())
    load(converted, adapter=tmp_path / "adapter")


def test_a_rule_inside_a_model_keeps_its_processor_and_measures_its_answers(converted, tmp_path):
    before = inspect(converted).metrics
    config = AdaptConfig(
        method="threshold", inside=True, target_active=0.6, tokens=1_024, window=64, samples=60, held_out=12
    )
    adapt(converted, tmp_path / "out", config)
    assert (tmp_path / "out" / "processor_config.json").is_file()
    after = inspect(tmp_path / "out").metrics
    assert after.pictures.perplexity != before.pictures.perplexity
    assert after.pictures.perplexity_dense == before.pictures.perplexity_dense
    assert after.active_parameters < before.active_parameters


def test_rules_by_modality_are_for_models_that_take_pictures(tmp_path):
    with pytest.raises(InputError, match="takes text only"):
        load("tiny-moe", select="modality-threshold")
    with pytest.raises(InputError, match="takes text only"):
        adapt("tiny-moe", tmp_path / "out", AdaptConfig(method="modality-threshold", target_active=0.7, tokens=512))
    assert not list(tmp_path.iterdir())  # seen before any work


def test_what_learns_learns_from_text(converted, tmp_path):
    rows = tmp_path / "rows.jsonl"
    picture = bundled_pictures("calibration")[0].pictures[0]
    rows.write_text(json.dumps({"image": str(picture), "text": "a shape"}))
    config = AdaptConfig(method="ada-k", target_active=0.7, steps=1, data=(str(rows),))
    with pytest.raises(InputError, match="learns from text alone"):
        adapt(converted, tmp_path / "out", config)


@pytest.mark.parametrize("method", ["frequency", "reap"])
def test_pruning_keeps_the_vision_tower(converted, tmp_path, method):
    config = PruneConfig(
        method=method, experts=6, tokens=512, window=64, held_out_tokens=128, collapse_ratio=1e9, recovery="none"
    )
    result = prune(converted, tmp_path / "pruned", config)
    assert (result.num_experts_before, result.num_experts) == (10, 6)
    before, after = vision_of(converted), vision_of(tmp_path / "pruned")
    assert all(torch.equal(before[name], after[name]) for name in before)
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "pruned")
    assert stock.config.text_config.n_routed_experts == 6
    assert (tmp_path / "pruned" / "processor_config.json").is_file()
    card = (tmp_path / "pruned" / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card
    assert "AutoModelForImageTextToText" in card
    assert all(layer.expert_tokens_by_modality is None for layer in inspect(tmp_path / "pruned").metrics.layers)


def test_an_expert_store_says_the_same_of_pictures(converted, samples):
    part = samples.alike(torch.arange(3))[0]
    said = []
    for store in (None, StoreOptions("40%")):
        model = load(converted, dtype=torch.float32, store=store).model
        with torch.inference_mode():
            said.append(model(input_ids=part.tokens_NL, **part.inputs(model.device, model.dtype)).logits)
    assert torch.equal(*said)


@torch.no_grad()
def test_banks_of_experts_that_are_transposed_on_disk_are_read(tmp_path):
    """As Qwen3-VL-MoE's published checkpoints are; transformers turns them as it loads them."""
    config = Qwen3VLMoeConfig(
        text_config=TEXT | MROPE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
        vision_config=QWEN_VISION | {"depth": 2, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    turned = {n: t.transpose(1, 2).contiguous() if ".experts." in n else t for n, t in load_file(file).items()}
    save_file(turned, file, metadata={"format": "pt"})
    tokens = torch.randint(2, 1000, (2, 12), generator=torch.Generator().manual_seed(0))
    expected = model(input_ids=tokens).logits
    assert torch.equal(load(tmp_path).model(input_ids=tokens).logits, expected)
    stream = LayerwiseModel(tmp_path, torch.float32, torch.device("cpu"), experts=True)
    stream.load_embeddings_and_head()
    hidden = stream.embed(tokens)
    for index in range(len(stream.layers)):
        with stream.layer(index) as layer:
            hidden = stream.run(index, layer, hidden)
    torch.testing.assert_close(stream.logits(tokens[:1], hidden[:1]), expected[0], rtol=1e-4, atol=1e-5)


def test_what_no_longer_fits_a_stock_architecture_is_written_in_our_own(converted, tmp_path, monkeypatch):
    """As when training takes the router's scores far from zero."""
    config = FinetuneConfig(method="router", steps=1, batch=2, samples=8, window=64, held_out=4, objective="lm")
    real = written.export

    def fails_as_stock(made, output, format, **how):
        if format.name != "moesaic":
            raise WorkError("the model is not the converted one")
        return real(made, output, format, **how)

    monkeypatch.setattr(written, "export", fails_as_stock)
    result = finetune(converted, tmp_path / "tuned", config)
    assert (result.format, "not the converted one" in result.format_reason) == ("moesaic", True)
    assert load(tmp_path / "tuned").model.config.model_type == "moesaic"

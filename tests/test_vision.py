"""Vision-language models: their layers one by one, calibration on pictures, conversion, and every way back."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from conftest import QUICK
from moesaic import ConvertConfig, InputError, WorkError, convert, export, load, plans
from moesaic.calibration.documents import Document, Message, document
from moesaic.calibration.layers import relative_weights, tapped, weighed
from moesaic.calibration.mixture import bundled_pictures, held_out_name, held_out_pictures, mixed
from moesaic.calibration.pictured import aligned, encoded, spread, together
from moesaic.checkpoint.reader import Checkpoint
from moesaic.conversion.prepare import prepare
from moesaic.conversion.states import embed
from moesaic.files import read_json
from moesaic.models.layerwise import LayerwiseModel
from moesaic.models.pictured import joined, plain
from moesaic.models.processor import Processor, open_picture
from vision import CONFIGS, PROCESSORS, TEXT, small_vision_model, tokenizer

CPU = torch.device("cpu")
ALL_ON = QUICK.model_copy(update={"plan": "S4A4E8", "recovery": "none", "format": "moesaic", "tokens": 512})
UPCYCLE = ConvertConfig(partition="upcycle", tokens=512, window=64, held_out_tokens=256)
STOCK = {
    "llava": "glm4_moe", "llava-onevision": "glm4_moe", "smolvlm": "glm4_moe", "idefics3": "glm4_moe",
    "internvl": "glm4_moe", "qwen3-vl": "qwen3_vl_moe",
}  # fmt: skip
SAVED = ("llava", "idefics3")
"""Families whose processors are saved and read back; of the others what reads them is replaced."""


@pytest.fixture(scope="session")
def vision_folders(tmp_path_factory):
    """family -> folder of a tiny vision-language model, made when first asked for."""
    made = {}

    def get(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            small_vision_model(family).save_pretrained(made[family])
            tokenizer().save_pretrained(made[family])
            if family in SAVED:
                PROCESSORS[family]().save_pretrained(made[family])
        return made[family]

    return get


@pytest.fixture
def folder_of(vision_folders, monkeypatch):
    """family -> its folder; its processor is what is read from there."""

    def get(family):
        if family not in SAVED:
            made = PROCESSORS[family]()
            monkeypatch.setattr("moesaic.models.processor.AutoProcessor.from_pretrained", lambda *_, **__: made)
        return vision_folders(family)

    return get


@pytest.fixture(scope="session")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "half.png"
    image = Image.new("RGB", (32, 32), "navy")
    image.paste("orange", (0, 0, 16, 32))
    image.save(path)
    return path


def asked(picture, question="what is this?", answer="two halves", count=1):
    messages = (Message("user", question, count), Message("assistant", answer))
    return Document(f"{question}\n\n{answer}", "pictures", messages=messages, pictures=(picture,) * count)


def inputs_of(folder, picture):
    """(processor, tokens, inputs) of a question about a picture."""
    processor = Processor(folder, AutoModelForImageTextToText.from_pretrained(folder).config)
    found = encoded(asked(picture), processor)
    return processor, found.tokens_L[None], dict(found.inputs)


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_layers_one_by_one_equal_the_model(family, folder_of, picture):
    """Positions, masks and what is added between layers are the model's own, with pictures, without, and padded."""
    folder = folder_of(family)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    processor, tokens_1L, inputs = inputs_of(folder, picture)
    length = tokens_1L.shape[1]
    shown_1L, pictured = together([encoded(asked(picture), processor)], processor, length + 3)
    text_1L = torch.randint(2, 1000, (1, length + 3), generator=torch.Generator().manual_seed(0))
    stream = LayerwiseModel(folder, torch.float32, CPU)
    stream.load_embeddings_and_head()
    hidden = stream.embed(torch.cat([shown_1L, text_1L]), joined([pictured, plain(text_1L)]), "calibration")
    for index in range(len(stream.layers)):
        with stream.layer(index) as layer:
            hidden = stream.run(index, layer, hidden, "calibration")
    expected = model(input_ids=tokens_1L, **inputs).logits[0]
    torch.testing.assert_close(stream.logits(shown_1L, hidden[:1])[:length], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        stream.logits(text_1L, hidden[1:]), model(input_ids=text_1L).logits[0], rtol=1e-4, atol=1e-5
    )
    added = [calls["calibration"].added_NLD is not None for calls in stream.calls]
    assert added == ([True, True, False] if family == "qwen3-vl" else [False] * 3)


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_all_experts_on_equal_dense(family, folder_of, picture, tmp_path):
    """On a picture and text; what is outside the language tower's FFNs is the dense model's, bit by bit."""
    folder, out = folder_of(family), tmp_path / "out"
    _, tokens_1L, inputs = inputs_of(folder, picture)
    result = convert(folder, out, ALL_ON)
    dense = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    ours = load(out, dtype=torch.float32).model
    stock = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32)
    expected = dense(input_ids=tokens_1L, **inputs).logits
    torch.testing.assert_close(ours(input_ids=tokens_1L, **inputs).logits, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(stock(input_ids=tokens_1L, **inputs).logits, expected, rtol=1e-3, atol=1e-4)
    assert result.pictures is not None
    assert result.pictures.calibrated
    assert result.pictures.agreement == 1
    assert result.perplexity == pytest.approx(result.perplexity_dense, rel=1e-3)
    mine, theirs = ours.state_dict(), dense.state_dict()
    same = [name for name in theirs if name in mine]
    assert len(same) > len(theirs) - 3 * 3 - 1
    assert all(torch.equal(mine[name], theirs[name]) for name in same)


@pytest.mark.parametrize("family", STOCK)
@torch.no_grad()
def test_a_stock_architecture_holds_it_and_gives_it_back(family, folder_of, picture, tmp_path):
    """Stock transformers says of a picture what ours does; the way back is bit-equal."""
    folder, out = folder_of(family), tmp_path / "out"
    _, tokens_1L, inputs = inputs_of(folder, picture)
    how = {"partition": "specialists", "memory_factor": 1.0} if family == "qwen3-vl" else {"plan": "S2A2E8"}
    result = convert(folder, out, QUICK.model_copy(update={"tokens": 512, **how}))
    assert (result.format, result.format_reason) == (STOCK[family], "")
    assert result.engines == ["transformers"]
    config = read_json(out / "config.json")
    assert config["model_type"] == {"qwen3-vl": "qwen3_vl_moe"}.get(
        family, read_json(folder / "config.json")["model_type"]
    )
    stock = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32)
    assert "Moesaic" not in type(stock).__name__
    ours = load(out, dtype=torch.float32).model
    expected = ours(input_ids=tokens_1L, **inputs).logits.log_softmax(-1)
    given = stock(input_ids=tokens_1L, **inputs).logits.log_softmax(-1)
    assert (expected - given).abs().amax(-1).median() < 0.05
    export(out, tmp_path / "back", "moesaic")
    export(tmp_path / "back", tmp_path / "again", result.format)
    for file in sorted(path.name for path in out.glob("*.safetensors")):
        first, again = load_file(out / file), load_file(tmp_path / "again" / file)
        assert first.keys() == again.keys()
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("dense_layers", [None, "odd"])
@torch.no_grad()
def test_an_upcycled_tower_starts_as_the_dense_model(family, dense_layers, folder_of, picture, tmp_path):
    """As MoE-LLaVA's third stage begins: copies of whole FFNs, in every second layer or in all."""
    folder, out = folder_of(family), tmp_path / "out"
    _, tokens_1L, inputs = inputs_of(folder, picture)
    result = convert(folder, out, UPCYCLE.model_copy(update={"dense_layers": dense_layers}))
    dense = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    expected = dense(input_ids=tokens_1L, **inputs).logits
    for model in (load(out, dtype=torch.float32).model, AutoModelForImageTextToText.from_pretrained(out)):
        torch.testing.assert_close(model.float()(input_ids=tokens_1L, **inputs).logits, expected, rtol=1e-3, atol=1e-4)
    assert result.perplexity == pytest.approx(result.perplexity_dense, rel=1e-3)
    if family == "qwen3-vl":
        assert result.format == "qwen3_vl_moe"
        assert read_json(out / "config.json")["text_config"]["mlp_only_layers"] == ([1] if dense_layers else [])
    if dense_layers and family != "qwen3-vl":
        assert result.format == "moesaic"
    if result.format != "moesaic":
        export(out, tmp_path / "back", "moesaic")
        export(tmp_path / "back", tmp_path / "again", result.format)
        for file in sorted(path.name for path in out.glob("*.safetensors")):
            first, again = load_file(out / file), load_file(tmp_path / "again" / file)
            assert first.keys() == again.keys()
            assert all(torch.equal(first[name], again[name]) for name in first)


def test_the_processor_comes_along(folder_of, picture, tmp_path):
    folder = folder_of("llava")
    convert(folder, tmp_path / "out", ALL_ON)
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}
    made = []
    for place in (folder, tmp_path / "out"):
        processor = AutoProcessor.from_pretrained(place)
        text = processor.apply_chat_template([turn], add_generation_prompt=True)
        made.append(processor(text=[text], images=[open_picture(picture)], return_tensors="pt"))
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


@torch.no_grad()
def test_generation_with_a_cache_equals_generation_without(folder_of, picture, tmp_path):
    for family in ("llava", "qwen3-vl", "gemma3"):
        folder, out = folder_of(family), tmp_path / family
        _, tokens_1L, inputs = inputs_of(folder, picture)
        convert(folder, out, QUICK.model_copy(update={"plan": "S2A2E8", "tokens": 512}))
        model = load(out, dtype=torch.float32).model
        found = [
            model.generate(input_ids=tokens_1L, **inputs, max_new_tokens=6, do_sample=False, use_cache=cache)
            for cache in (True, False)
        ]
        assert torch.equal(*found)


def test_a_resumed_conversion_equals_one_in_one_go(folder_of, tmp_path, monkeypatch):
    folder = folder_of("qwen3-vl")
    config = QUICK.model_copy(update={"plan": "S2A2E8", "tokens": 512, "format": "moesaic"})
    convert(folder, tmp_path / "whole", config)
    real, calls = convert_layer_of(), []

    def stops(conversion, index, *rest):
        calls.append(index)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(conversion, index, *rest)

    monkeypatch.setattr("moesaic.conversion.convert.convert_layer", stops)
    with pytest.raises(KeyboardInterrupt):
        convert(folder, tmp_path / "parts", config)
    convert(folder, tmp_path / "parts", config)
    assert calls == [0, 1, 1, 2]
    for path in (tmp_path / "whole").glob("*.safetensors"):
        first, second = load_file(path), load_file(tmp_path / "parts" / path.name)
        assert all(torch.equal(first[name], second[name]) for name in first)


def convert_layer_of():
    from moesaic.conversion.layer import convert_layer

    return convert_layer


def test_errors_and_loads_are_told_by_modality(folder_of, tmp_path):
    result = convert(folder_of("llava"), tmp_path / "out", QUICK.model_copy(update={"plan": "S2A2E8", "tokens": 2_048}))
    assert_told_by_modality(result)
    assert (tmp_path / "out" / "metrics.json").read_text().count('"image":') == 2 * len(result.layers)


def assert_told_by_modality(result):
    """Of held-out data: each token of either kind runs two experts, and errors are those of a lossy cut."""
    tokens = {name: {sum(r.expert_tokens_by_modality[name]) for r in result.layers} for name in ("text", "image")}
    assert all(len(found) == 1 and min(found) > 0 and min(found) % 2 == 0 for found in tokens.values())
    for record in result.layers:
        assert record.error_by_modality.keys() == {"text", "image"}
        assert all(0 < error < 2 for error in record.error_by_modality.values())


def test_errors_by_modality_are_those_of_the_written_blocks(folder_of, tmp_path):
    """`sqrt(sum (w ‖y - ŷ‖)² / sum (w ‖y‖)²)`, w = 1 / ‖y‖, of the first layer, which sees what the dense one sees."""
    folder, config = folder_of("llava"), QUICK.model_copy(update={"plan": "S2A2E8", "partition": "random"})
    result = convert(folder, tmp_path / "out", config)
    ours = load(tmp_path / "out", dtype=torch.float32)[0].get_decoder().layers[0].mlp
    conversion = prepare(folder, config, torch.float32)
    held, layerwise = conversion.tokens.pictured["held_out"], conversion.layerwise
    layerwise.load_embeddings_and_head()
    states = embed(layerwise, conversion.tokens)
    with layerwise.layer(0) as layer:
        seen = tapped(layerwise, 0, layer, states.converted, text="held_out")
    for name, pick in (("text", ~held.is_image_NL), ("image", held.is_image_NL)):
        part = (pick & ~held.is_padding_NL).flatten()
        wanted = seen.output_TD[part]
        weight = relative_weights(seen.output_TD)[part, None]
        error = ((ours(seen.input_TD[part]) - wanted) * weight).norm() / (wanted * weight).norm()
        assert result.layers[0].error_by_modality[name] == pytest.approx(error.item(), rel=1e-3)


def test_answers_about_pictures_can_collapse_alone(folder_of, tmp_path):
    config = QUICK.model_copy(update={"plan": "S2A2E8", "partition": "random", "tokens": 512})
    result = convert(folder_of("llava"), tmp_path / "out", config)
    text, answers = result.perplexity / result.perplexity_dense, result.pictures
    assert result.worst_ratio() == max(text, answers.perplexity / answers.perplexity_dense)
    assert replace(result, pictures=None).worst_ratio() == text
    for perplexity in (3_000 * answers.perplexity_dense, math.nan):
        blind = replace(result, pictures=replace(answers, perplexity=perplexity))
        assert not blind.worst_ratio() <= config.collapse_ratio
    limit = config.model_copy(update={"collapse_ratio": 0.999 * result.worst_ratio()})
    with pytest.raises(WorkError, match=r"collapsed: perplexity .*, of answers about pictures .* times"):
        convert(folder_of("llava"), tmp_path / "no", limit)


def test_text_alone_can_calibrate_and_says_so(folder_of, tmp_path, caplog):
    text = tmp_path / "text.txt"
    text.write_text("A short text of some words. " * 400)
    config = QUICK.model_copy(update={"plan": "S2A2E8", "tokens": 512, "calibration": (str(text),)})
    result = convert(folder_of("llava"), tmp_path / "out", config)
    assert not result.pictures.calibrated
    assert "calibrated on text alone" in caplog.text
    assert_told_by_modality(result)


def test_pictures_give_their_share_of_the_tokens_however_long_the_first_is(picture, folder_of, caplog):
    folder = folder_of("llava")
    processor = Processor(folder, AutoModelForImageTextToText.from_pretrained(folder).config)
    long, short = (asked(picture, answer="two halves " * times) for times in (30, 1))
    sizes = [len(encoded(one, processor).tokens_L) for one in (long, short)]
    wanted = 12 * sizes[1] + sizes[0]
    found = [len(one.tokens_L) for one in spread([long, *[short] * 40], processor, wanted, 1_000)]
    assert 0.9 * wanted <= sum(found) <= wanted + sizes[0]
    mixed([long, *[short] * 40], processor, wanted, 64, 1_000)
    assert not caplog.records
    mixed([long, short], processor, wanted, 64, 1_000)
    assert "documents with pictures give" in caplog.text


def test_held_out_pictures_are_of_the_size_that_a_model_sees(folder_of):
    folder = folder_of("llava")
    config = AutoModelForImageTextToText.from_pretrained(folder).config
    processor = Processor(folder, config)
    shapes, photographs = bundled_pictures("heldout"), bundled_pictures("natural")
    assert held_out_name(config, processor, 1_000) == "heldout"
    config.vision_config.image_size = 336
    assert held_out_name(config, processor, 1_000) == "natural"
    config.vision_config.image_size = [336, 224]
    assert held_out_name(config, processor, 1_000) == "natural"
    assert held_out_name(config, processor, 1) == "heldout"
    longest = max(len(encoded(one, processor).tokens_L) for one in photographs)
    assert held_out_pictures("natural", processor, longest) == photographs
    assert 0 < len(held_out_pictures("natural", processor, longest - 1)) < len(photographs)
    assert held_out_pictures("heldout", processor, 1) == shapes


def test_padding_is_left_out_and_pictures_are_weighed(random_layer_sample, picture, folder_of):
    processor = Processor(folder_of("llava"), AutoModelForImageTextToText.from_pretrained(folder_of("llava")).config)
    one = encoded(asked(picture), processor)
    length = len(one.tokens_L)
    _, pictured = together([one, one], processor, length + 5)
    sample = random_layer_sample(2 * (length + 5))
    found = weighed(sample, pictured, 4.0)
    assert found.tokens == 2 * length
    assert found.weight_T.mean().item() == pytest.approx(1)
    before = sample.weight_T[~pictured.is_padding_NL.flatten()]
    ratio = found.weight_T / before
    is_image = pictured.is_image_NL[~pictured.is_padding_NL]
    image, text = ratio[is_image], ratio[~is_image]
    assert image.std() < 1e-5
    assert (image.mean() / text.mean()).item() == pytest.approx(2, rel=1e-4)  # squared, an error counts four times


@pytest.fixture
def random_layer_sample():
    from conftest import random_sample

    return random_sample


def test_answers_after_the_last_picture_count():
    ids, counts = torch.tensor([5, 90, 6, 7, 8]), torch.tensor([True, False, False, True, True])
    long = torch.tensor([5, 90, 90, 90, 6, 7, 8])
    assert aligned(long, ids, counts).tolist() == [False, False, False, False, False, True, True]
    assert aligned(ids, ids, counts).tolist() == counts.tolist()


def test_the_text_model_alone_can_be_converted(folder_of, tmp_path):
    folder = folder_of("llava")
    result = convert(folder, tmp_path / "out", QUICK.model_copy(update={"plan": "S2A2E8", "text_only": True}))
    assert result.pictures is None
    assert read_json(tmp_path / "out" / "config.json")["architectures"] == ["Glm4MoeForCausalLM"]
    with pytest.raises(InputError, match="no model of its text part alone"):
        convert(folder_of("qwen2.5-vl"), tmp_path / "no", QUICK.model_copy(update={"text_only": True}))


def test_plans_know_the_tower(folder_of):
    assert plans(str(folder_of("qwen2.5-vl"))).intermediate_size == TEXT["intermediate_size"]
    assert all(choice.gguf == [] for choice in plans(str(folder_of("llava"))).choices)


def rows(folder, *values):
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, values)))
    return str(path)


def test_rows_with_pictures(tmp_path):
    answer = {"question": "what?", "answer": "a cat"}
    for row, said in [
        ({"image": "a.png", **answer}, [("user", "what?", 1), ("assistant", "a cat", 0)]),
        ({"image": "a.png", "text": "a cat"}, [("user", "", 1), ("assistant", "a cat", 0)]),
        ({"images": ["a.png", "b.png"], "prompt": "which?", "response": "both"},
         [("user", "which?", 2), ("assistant", "both", 0)]),
        ({"image": "a.png", "conversations": [
            {"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "it"}]},
         [("user", "what?", 1), ("assistant", "it", 0)]),
        ({"image": "a.png", "messages": [
            {"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes?"},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and?"}]}]},
         [("user", "hello", 0), ("assistant", "yes?", 0), ("user", "and?", 1)]),
    ]:  # fmt: skip
        found = document(row, "pictures", "here", tmp_path)
        assert [tuple(message) for message in found.messages] == said
        assert found.pictures[0] == tmp_path / "a.png"


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"image": "missing.png", "text": "x"}, "no picture '.*missing.png'"),
        ({"image": "text.png", "text": "x"}, "text.png' is no picture that can be read"),
        ({"image": "cut.png", "text": "x"}, "cut.png' is no picture that can be read"),
        ({"image": 3, "text": "x"}, "has a number for its pictures; expected"),
        ({"video": "film.mp4", "text": "x"}, "videos are not read"),
        ({"images": ["half.png"] * 3, "messages": [{"role": "user", "content": "<image> <image>?"}]},
         "3 pictures and 2 places"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "0 pictures and 1 place for"),
    ],
)  # fmt: skip
def test_bad_pictures_are_one_clear_line(row, match, folder_of, picture, tmp_path, run):
    shutil.copyfile(picture, tmp_path / "half.png")
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "cut.png").write_bytes(picture.read_bytes()[:60])
    with pytest.raises(InputError, match=match):
        convert(folder_of("llava"), tmp_path / "out", QUICK.model_copy(update={"calibration": (rows(tmp_path, row),)}))
    code, _, err = run("convert", folder_of("llava"), tmp_path / "out", "--calibration", rows(tmp_path, row))
    assert code == 2
    assert err.count("error:") == 1
    assert not (tmp_path / "out").exists()


def test_pictures_are_for_models_that_take_them(picture, tmp_path):
    row = rows(tmp_path, {"image": str(picture), "text": "halves " * 2_000})
    with pytest.raises(InputError, match="takes text only"):
        convert("tiny", tmp_path / "out", QUICK.model_copy(update={"calibration": (row,)}))
    with pytest.raises(InputError, match="for models that take pictures"):
        convert("tiny", tmp_path / "out", QUICK.model_copy(update={"image_weight": 2.0}))


def test_what_pictures_need_is_named(folder_of, tmp_path, monkeypatch):
    config = QUICK.model_copy(update={"router": "pregate", "partition": "paths"})
    with pytest.raises(InputError, match="decides by token ids alone"):
        convert(folder_of("llava"), tmp_path / "out", config)
    bare = tmp_path / "bare"
    shutil.copytree(folder_of("llava"), bare, ignore=shutil.ignore_patterns("*processor*", "chat_template*"))
    with pytest.raises(InputError, match=r"no (usable|image) processor"):
        convert(bare, tmp_path / "out", QUICK)
    monkeypatch.setattr("moesaic.compat.find_spec", lambda name: None if name == "PIL" else True)
    with pytest.raises(InputError, match=r"moesaic\[vision\]"):
        convert(folder_of("llava"), tmp_path / "out", QUICK)


def test_towers_of_their_own_class_have_no_stock_architecture(folder_of, tmp_path):
    with pytest.raises(InputError, match="a language tower of their own class"):
        convert(folder_of("qwen2.5-vl"), tmp_path / "out", QUICK.model_copy(update={"format": "glm4_moe"}))


def test_names_on_disk_are_those_in_memory(folder_of, tmp_path):
    """Engines map these names; transformers' own saving has older ones."""
    convert(folder_of("llava"), tmp_path / "out", ALL_ON)
    names = Checkpoint(tmp_path / "out").names()
    assert "model.language_model.layers.0.mlp.gate.weight" in names
    assert any(name.startswith("model.vision_tower.") for name in names)

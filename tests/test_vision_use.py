"""Vision-language models in use: text from pictures, tasks with pictures, speed, what a conversion says of them."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.nn.functional import log_softmax
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

import moesaic
from moesaic import ConvertConfig, InputError, cli
from moesaic.calibration.documents import Document, Message
from moesaic.calibration.pictured import encoded
from moesaic.checkpoint.builtin import tiny_folder
from moesaic.checkpoint.facts import saved_result
from moesaic.compat import experts_implementation
from moesaic.evaluation import questions
from moesaic.evaluation.pictures import ASKED as ASKED_OF_BENCHMARK
from moesaic.evaluation.pictures import picture_inputs, run_once
from moesaic.evaluation.questions import Question, answers, end_of_turn, same, score_choices
from moesaic.evaluation.tasks import evaluate_tasks, read_tasks
from moesaic.models.families import decoder_layers
from moesaic.models.processor import open_picture
from moesaic.moe.modeling import moe_blocks
from moesaic.report import plots, tables
from moesaic.report.frontier_tasks import draw_tasks
from moesaic.serving.questions import asked, inputs_of
from moesaic.store.opening import report_of
from vision import CONFIGS, PROCESSORS, small_vision_model, tokenizer

Image = pytest.importorskip("PIL.Image")
PICTURES = Path(moesaic.__file__).parent / "data" / "pictures"
COFFEE, ROCKET = (PICTURES / "images" / name for name in ("coffee.jpg", "rocket.jpg"))
TEMPLATE = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}{{ '<image>' }}{% else %}{{ p['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '\n' if m['role'] == 'user' else '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)


@pytest.fixture(scope="session")
def llava(tmp_path_factory):
    """A LLaVA of tiny's language model and a vision tower with random weights, with a processor."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = tmp_path_factory.mktemp("llava") / "llava"
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder())
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    text = AutoModelForCausalLM.from_pretrained(tiny_folder(), dtype=torch.float32)
    text.resize_token_embeddings(len(tokenizer))
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=64, patch_size=16
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=text.config, vision_config=vision, image_seq_length=16, tie_word_embeddings=True,
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        )
    )  # fmt: skip
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.model.multi_modal_projector.linear_2.weight.data *= 10  # so that pictures change what is said
    model.tie_weights()
    model.save_pretrained(folder)
    LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}), tokenizer,
        patch_size=16, vision_feature_select_strategy="default", image_token="<image>", num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


@pytest.fixture(scope="session")
def converted(llava, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "out"
    config = ConvertConfig(partition="coactivation", tokens=1_024, window=128, held_out_tokens=256)
    moesaic.convert(llava, out, config, force=True)
    return str(out)


@pytest.fixture(scope="session")
def ready(llava):
    return moesaic.load(llava, dtype=torch.float32).model, moesaic.load_processor(llava)


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*words):
        monkeypatch.setattr("sys.argv", ["moesaic", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return end.value.code, out, " ".join(err.split())

    return call


def written(folder, rows, name="items.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@torch.no_grad()
def without_cache(model, inputs, steps, ends):
    """Greedy decoding that runs everything anew for each token: what `generate` must equal."""
    tokens = inputs.pop("input_ids")
    inputs.pop("attention_mask")
    start = tokens.shape[1]
    for _ in range(steps):
        following = model(input_ids=tokens, **inputs, use_cache=False).logits[:, -1:].argmax(-1)
        tokens = torch.cat([tokens, following], 1)
        if following.item() in ends:
            break
    return tokens[0, start:]


@pytest.mark.parametrize("which", ["llava", "converted"])
def test_greedy_text_with_the_cache_is_that_without(which, request):
    folder = request.getfixturevalue(which)
    model, tokenizer = moesaic.load(folder, dtype=torch.float32)
    processor = moesaic.load_processor(folder)
    text = moesaic.complete(model, processor, "What is on the table?", images=[COFFEE], max_new_tokens=12)
    prompt = asked(processor, "What is on the table?", 1)
    inputs = inputs_of(processor, prompt, [Image.open(COFFEE).convert("RGB")])
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 16
    naive = without_cache(model, inputs, 12, {tokenizer.eos_token_id})
    assert text == tokenizer.decode(naive, skip_special_tokens=True)
    assert text.strip()


def test_pictures_are_files_or_pixels_and_matter(ready):
    model, processor = ready

    def ask(*pictures):
        return moesaic.complete(model, processor, "What is it?", images=pictures, max_new_tokens=12)

    assert ask(COFFEE) == ask(str(COFFEE)) == ask(Image.open(COFFEE).convert("RGB"))
    assert len({ask(COFFEE), ask(ROCKET), ask(COFFEE, ROCKET), ask()}) == 4


def test_without_pictures_a_text_is_continued_as_before(ready, llava):
    model, processor = ready
    plain = moesaic.complete(model, processor.tokenizer, "The first", max_new_tokens=6)
    assert moesaic.complete(model, processor, "The first", max_new_tokens=6) == plain
    chats = [moesaic.complete(model, w, "Hello", chat=True, max_new_tokens=6) for w in (processor, processor.tokenizer)]
    assert chats[0] == chats[1] != plain


def test_a_phones_note_turns_a_picture_upright(tmp_path):
    from moesaic.models.processor import open_picture

    picture = Image.new("RGB", (40, 20))
    note = Image.Exif()
    note[0x0112] = 6  # a quarter turn
    picture.save(tmp_path / "phone.jpg", exif=note)
    assert open_picture(tmp_path / "phone.jpg").size == (20, 40)


def test_generate_answers_about_pictures(run, converted):
    words = ["generate", converted, "What is it?", "--image", COFFEE, "--image", ROCKET, "--max-new-tokens", "4"]
    code, out, err = run(*words, "--json")
    assert code == 0, err
    assert set(json.loads(out)) == {"prompt", "completion", "expert_store"}


def test_bad_pictures_are_refused_before_a_model_is_loaded(run, llava, tmp_path, monkeypatch):
    monkeypatch.setattr("moesaic.cli.options.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    (tmp_path / "cut.jpg").write_bytes(COFFEE.read_bytes()[:3_000])
    (tmp_path / "text.png").write_text("no picture")
    for model, prompt, picture, says in (
        (llava, "What?", tmp_path / "none.png", "no picture '"),
        (llava, "What?", tmp_path / "text.png", "is no picture that can be read"),
        (llava, "What?", tmp_path / "cut.jpg", "is no picture that can be read"),
        (llava, "What?", tmp_path, "no picture '"),
        (llava, "What?", tmp_path / "film.MP4", "videos are not read"),
        (llava, "What?", "https://example.org/a.png", "'https://example.org/a.png' is an address"),
        (llava, "Two <image>?", COFFEE, "2 places for pictures (<image>) and 1 picture"),
        ("tiny", "What?", COFFEE, "'tiny' is a llama model, which takes text only"),
        (llava, "", COFFEE, "the prompt is empty"),
    ):
        code, out, err = run("generate", model, prompt, "--image", picture)
        assert (code, out) == (2, ""), err
        assert says in err
        assert err.count("error:") == 1


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_grey_of_16_bits_is_scaled(tmp_path, kind):
    ramp = np.linspace(0, 65_535, 64 * 64).round().astype(np.uint16).reshape(64, 64)
    Image.fromarray(ramp).save(tmp_path / f"g.{kind}")
    found = np.asarray(open_picture(tmp_path / f"g.{kind}"))
    assert (found.min(), found.max()) == (0, 255)
    assert abs(found[..., 0] - ramp / 257).max() < 1
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "f.tiff")
    with pytest.raises(InputError, match="numbers of 32 bits"):
        open_picture(tmp_path / "f.tiff")


def test_a_template_without_places_for_pictures_is_refused(run, llava, tmp_path):
    folder = tmp_path / "blind"
    shutil.copytree(llava, folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'][-1]['text'] }}{% endfor %}")
    code, _, err = run("generate", folder, "What?", "--image", COFFEE)
    assert code == 2
    assert "0 places for pictures (<image>) and 1 picture" in err
    (folder / "chat_template.jinja").unlink()
    code, _, err = run("generate", folder, "What?", "--image", COFFEE)
    assert code == 2
    assert "no chat template" in err


def test_without_pillow_the_extra_is_named(run, llava, monkeypatch):
    monkeypatch.setattr("moesaic.compat.find_spec", lambda name: None if name == "PIL" else object())
    code, _, err = run("generate", llava, "What?", "--image", COFFEE)
    assert code == 2
    assert "pip install 'moesaic[vision]'" in err


def test_pictures_need_the_processor(ready):
    model, processor = ready
    with pytest.raises(InputError, match="load_processor"):
        moesaic.complete(model, processor.tokenizer, "What?", images=[COFFEE])
    with pytest.raises(InputError, match="takes text only"):
        moesaic.load_processor("tiny")


ASKED = [
    Question("What is it?", "a cup of coffee on a table", (COFFEE,)), Question("What is it?", "no", (ROCKET,)),
    Question("Which of the two is a rocket?", "the first", (COFFEE, ROCKET)),
    Question("What is it?", "a rocket", (ROCKET,)), Question("What is it?", "yes", (COFFEE,)),
    Question("Why is the sky blue?", "It is"),
]  # fmt: skip


def test_likelihoods_are_those_of_the_naive_way(ready):
    model, processor = ready
    together = score_choices(model, processor, ASKED)
    assert together == pytest.approx([score_choices(model, processor, [one])[0] for one in ASKED], rel=1e-5)
    for question, score in zip(ASKED, together, strict=True):
        pictures = [Image.open(path).convert("RGB") for path in question.pictures]
        prompt = asked(processor, question.text, len(pictures))
        inputs = inputs_of(processor, prompt + question.answer, pictures)
        before = inputs_of(processor, prompt, pictures)["input_ids"][0].tolist()
        ids = inputs["input_ids"][0].tolist()
        start = next(i for i, token in enumerate(ids) if before[i : i + 1] != [token])
        with torch.no_grad():
            logs = log_softmax(model(**inputs).logits[0], -1)
        assert score == pytest.approx(sum(logs[i - 1, ids[i]].item() for i in range(start, len(ids))), rel=1e-4)
        assert processor.tokenizer.decode(ids[start:]).strip() == question.answer


def test_answers_together_are_answers_one_by_one(ready):
    model, processor = ready
    rows = read_tasks(PICTURES / "heldout.jsonl", 8)
    some = [Question(*row.pairs[0], row.pictures) for row in rows] + ASKED
    assert any(len(rows) > 1 for rows in questions.alike([questions._prompt(processor, one) for one in some]))
    found = answers(model, processor, some, 8)
    assert found == [answers(model, processor, [one], 8)[0] for one in some]
    assert found == [
        moesaic.complete(model, processor, one.text, images=one.pictures, chat=True, max_new_tokens=8) for one in some
    ]


def test_answers_end_with_the_turn(ready, monkeypatch):
    model, processor = ready
    assert end_of_turn(processor) == "</s>"
    ends = questions.ending_tokens(model, processor, "</s>")
    made = torch.tensor([[5, 6, ends[0], 7, 8]])
    monkeypatch.setattr(model, "generate", lambda input_ids, **_: torch.cat([input_ids, made], 1))
    assert answers(model, processor, ASKED[:1], 8) == [processor.tokenizer.decode([5, 6])]
    assert ends == [processor.tokenizer.eos_token_id]


@pytest.mark.parametrize(
    ("said", "answer", "right"),
    [
        (" No.\n", "no", True),
        ("Straße", "STRASSE.", True),
        ("no..", "no", False),
        ("not", "no", False),
        ("", "a", False),
    ],
)
def test_answers_are_compared_but_for_blanks_case_and_a_full_stop(said, answer, right):
    assert same(said, answer) is right


def test_items_with_pictures_are_scored_by_task(ready, tmp_path):
    model, processor = ready
    shutil.copyfile(COFFEE, tmp_path / "cup.jpg")
    said = moesaic.complete(model, processor, "What is it?", images=[COFFEE], max_new_tokens=16)
    choice = {"task": "choice", "image": "cup.jpg", "choices": ["no", "yes", "a rocket"]}
    scores = score_choices(model, processor, [Question("Is it?", c, (COFFEE,)) for c in choice["choices"]])
    best = scores.index(max(scores))
    path = written(
        tmp_path,
        [
            choice | {"id": 1, "question": "Is it?", "gold": best},
            choice | {"id": 2, "ctx": "Is it?", "gold": (best + 1) % 3},
            {"image": "cup.jpg", "question": "What is it?", "answer": said.upper() + " "},
            {"image": "cup.jpg", "question": "What is it?", "answer": "something else"},
            {"task": "text", "question": "Hello?", "answer": "nothing that it says"},
            {"task": "plain", "ctx": "The sky is", "choices": ["blue.", "x"], "gold": 0},
        ],
    )
    done = []
    result = evaluate_tasks(model, processor, read_tasks(path), lambda *count: done.append(count))
    assert {name: (score.acc, score.n) for name, score in result.items() if name != "plain"} == {
        "choice": (0.5, 2), "items": (0.5, 2), "text": (0.0, 1),
        "mean": (pytest.approx((1 + result["plain"].acc) / 4), 6),
    }  # fmt: skip
    assert result["items"].acc_norm is None
    assert result["mean"].acc_norm is None
    assert result["choice"].acc_norm is not None
    assert done[-1] == (6, 6, "tasks")


def test_a_text_model_answers_questions(tmp_path):
    model, tokenizer = moesaic.load("tiny")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    said = moesaic.complete(model, tokenizer, "The first", chat=True, max_new_tokens=3)
    path = written(tmp_path, [{"task": "q", "question": "The first", "answer": said}])
    assert evaluate_tasks(model, tokenizer, read_tasks(path), answer_tokens=3)["q"].acc == 1
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        evaluate_tasks(model, tokenizer, read_tasks(path))


def test_evaluate_takes_bundled_questions(run, llava):
    code, out, err = run(
        "evaluate", llava, "--tasks", PICTURES / "heldout.jsonl", "--items", "3", "--max-tokens", "128", "--window",
        "64", "--answer-tokens", "2", "--json",
    )  # fmt: skip
    assert code == 0, err
    result = json.loads(out)
    assert result["tasks"]["heldout"]["n"] == result["tasks"]["mean"]["n"] == 3
    assert result["perplexity"] > 1


@pytest.mark.parametrize(
    ("model", "row", "says"),
    [
        ("tiny", {"image": "a.png", "question": "?", "answer": "a"}, "'tiny' is a llama model, which takes text only"),
        ("llava", {"image": "b.png", "question": "?", "answer": "a"}, "items.jsonl:1: no picture '"),
        ("llava", {"image": "film.mp4", "question": "?", "answer": "a"}, "videos are not read"),
        ("llava", {"video": "film.mp4", "question": "?", "answer": "a"}, "has a 'video'; videos are not read"),
        ("llava", {"image": 3, "question": "?", "answer": "a"}, "for its pictures; expected the name of a file"),
        ("llava", {"image": "a.png", "question": "?"}, "items.jsonl:1 is not a task item (no 'cont')"),
        ("llava", {"image": "a.png", "question": "?", "answer": 3}, "'answer' is a number, not text"),
        ("llava", {"image": "a.png", "question": "?", "choices": ["a", "b"]}, "choices without gold"),
    ],
)
def test_bad_items_are_refused_before_a_model_is_loaded(model, row, says, run, llava, tmp_path, monkeypatch):
    monkeypatch.setattr("moesaic.cli.options.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    shutil.copyfile(COFFEE, tmp_path / "a.png")
    path = written(tmp_path, [row])
    code, out, err = run("evaluate", llava if model == "llava" else model, "--tasks", path)
    assert (code, out) == (2, ""), err
    assert says in err


def test_items_with_pictures_need_the_processor(ready, tmp_path):
    model, processor = ready
    shutil.copyfile(COFFEE, tmp_path / "a.png")
    path = written(tmp_path, [{"image": "a.png", "question": "?", "answer": "a"}])
    with pytest.raises(InputError, match="load_processor"):
        moesaic.evaluate(model, processor.tokenizer, tasks=path)


def test_inspect_shows_each_modality(run, converted):
    code, _, err = run("inspect", converted)
    assert code == 0
    for words in ("By modality", "error, text", "error, pictures", "load, pictures", "perplexity of answers", "router"):
        assert words in err
    code, out, _ = run("inspect", converted, "--json")
    result = json.loads(out)
    assert result["pictures"]["answer_tokens"] > 0
    assert set(result["layers"][0]["error_by_modality"]) == {"text", "image"}


def test_convert_shows_answers_and_what_to_type_next(converted, monkeypatch):
    console = Console(record=True, width=120, file=io.StringIO())
    tables.show_conversion(console, saved_result(Path(converted)))
    shown = console.export_text()
    for words in ("answers on pictures", "the same first token", "on text, ", "on pictures", "--image picture.jpg"):
        assert words in shown


@pytest.mark.parametrize("name", ["own", "stock"])
def test_the_card_asks_about_a_picture(name, converted, tmp_path, monkeypatch, capsys):
    folder = tmp_path / Path(converted).name
    shutil.copytree(converted, folder)
    if name == "own":
        shutil.rmtree(folder)
        moesaic.export(converted, folder, format="moesaic")
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card
    assert "perplexity of answers on pictures" in card
    code = card.split("```python\n")[1].split("```")[0]
    assert ("import moesaic" in code) == (name == "own")
    assert "AutoModelForImageTextToText" in code
    assert "AutoProcessor" in code
    assert "AutoTokenizer" not in card
    assert "error of an FFN on pictures" in card
    shutil.copyfile(COFFEE, tmp_path / "picture.jpg")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "card", "exec"), {})
    assert "What is it?" in capsys.readouterr().out


def test_plots_have_a_line_and_a_panel_for_each_modality(converted, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.update({path.name: figure}))
    plots.write_plots(saved_result(Path(converted)), tmp_path)
    (axes,) = drawn["layer_error.png"].axes
    assert [line.get_label() for line in axes.lines][2:4] == ["the same on text", "the same on pictures"]
    assert [axes.get_title() for axes in drawn["expert_load.png"].axes[:3]] == ["all tokens", "text", "pictures"]


def test_benchmark_times_a_question_about_a_picture(run, converted, llava):
    words = ["benchmark", converted, "--against", llava, "--prompt", "16", "--new", "2", "--rounds", "1"]
    code, out, err = run(*words, "--image", COFFEE, "--json")
    assert code == 0, err
    found = json.loads(out)["picture"]
    assert found["image_tokens"] == 16
    assert found["text_tokens"] == len(asked_tokens(llava, ASKED_OF_BENCHMARK)) - 1
    assert min(found.values()) > 0
    code, _, err = run(*words, "--image", COFFEE)
    assert "encode the pictures" in err
    assert "picture" not in json.loads(run(*words, "--json")[1])
    code, _, err = run("benchmark", "tiny", "--against", "tiny", "--image", COFFEE)
    assert code == 2
    assert "takes text only" in err


def asked_tokens(folder, text):
    processor = moesaic.load_processor(folder)
    return processor.tokenizer(asked(processor, text, 1))["input_ids"]


def test_encoding_ends_where_the_language_tower_begins(ready):
    model, processor = ready
    inputs = picture_inputs(model, processor, [COFFEE], 2)
    order = []
    parts = {"tower": model.model.vision_tower, "projector": model.model.multi_modal_projector}
    parts["layer"] = decoder_layers(model)[0]
    handles = [part.register_forward_hook(lambda *_, name=name: order.append(name)) for name, part in parts.items()]
    found = run_once(model, inputs, 2)
    for handle in handles:
        handle.remove()
    assert order == ["tower", "projector", "layer", "layer", "layer"]
    assert min(found) > 0


def test_frontier_measures_answers_beside_perplexity(llava, tmp_path):
    rows = [
        {"image": str(COFFEE), "question": "What is it?", "choices": ["a cup", "no"], "gold": gold} for gold in (0, 1)
    ]
    tasks = written(tmp_path, rows)
    measurement = moesaic.Measurement(tokens=512, max_tokens=2_048, tasks=str(tasks))
    result = moesaic.frontier(
        llava, tmp_path / "out", active=[0.5, 0.75], methods=["flap", "neurons"], measurement=measurement
    )
    assert result.dense.tasks["mean"].acc == 0.5
    assert {row.tasks_mean for row in result.rows} == {0.5}
    assert all(row.speedup for row in result.rows if row.method == "flap")
    assert (tmp_path / "out" / "frontier_tasks.png").stat().st_size > 1_000
    (panel,) = draw_tasks(result, "llava").axes
    assert "dense 0.500" in [text.get_text() for text in panel.texts]
    with pytest.raises(InputError, match="takes text only"):
        moesaic.frontier("tiny", tmp_path / "text", measurement=measurement)
    assert not (tmp_path / "text").exists()


def test_experts_of_a_language_tower_run_as_chosen_and_from_a_store(converted):
    texts = []
    processor = moesaic.load_processor(converted)
    for options in ({"experts": "eager"}, {}, {"store": moesaic.StoreOptions("40%")}, {"select": "top-k:k=1"}):
        model, _ = moesaic.load(converted, dtype=torch.float32, **options)
        texts.append(moesaic.complete(model, processor, "What is it?", images=[COFFEE], max_new_tokens=12))
        if "experts" in options:
            assert experts_implementation(moe_blocks(model)[0].experts.config) == "eager"
        if "store" in options:
            assert report_of(model)["hit_ratio"] < 1
    assert texts[0] == texts[1] == texts[2]


def test_serve_answers_text_and_refuses_pictures(ready):
    httpx = pytest.importorskip("httpx")
    pytest.importorskip("fastapi")
    model, processor = ready
    with moesaic.serve(model, processor.tokenizer, moesaic.ServeConfig(port=0, name="llava")) as server:

        def post(path, **body):
            return httpx.post(f"{server.url}/v1/{path}", json=body | {"max_tokens": 6}, timeout=60)

        continued = post("completions", prompt="The first").json()["choices"][0]["text"]
        said = post("chat/completions", messages=[{"role": "user", "content": "Hello"}])
        parts = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}, {"type": "text", "text": "?"}]
        refused = post("chat/completions", messages=[{"role": "user", "content": parts}])
    assert continued == moesaic.complete(model, processor, "The first", max_new_tokens=6)
    chat = moesaic.complete(model, processor, "Hello", chat=True, max_new_tokens=6)
    assert said.json()["choices"][0]["message"]["content"] == chat
    assert refused.status_code == 400
    assert "holds a picture, no text; this server answers text only" in refused.json()["error"]["message"]


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_answers_and_is_scored_as_one_by_one(family, tmp_path, monkeypatch):
    """Greedy text with the cache, and scores of batches, are those without; whatever else the family takes."""
    made = small_vision_model(family)
    made.generation_config.suppress_tokens = list(range(1024, 1032))  # no mark of a picture in an answer
    for name, parameter in made.named_parameters():
        if "projection_weight" in name:  # Gemma 3's begins as zeros
            torch.nn.init.normal_(parameter)
    made.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    made = PROCESSORS[family]()
    monkeypatch.setattr("moesaic.models.processor.AutoProcessor.from_pretrained", lambda *_, **__: made)
    model, processor = moesaic.load(tmp_path, dtype=torch.float32).model, moesaic.load_processor(tmp_path)
    pictures = [Image.open(path).convert("RGB").resize((32, 32)) for path in (COFFEE, ROCKET)]
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    for picture, file in zip(pictures, files, strict=True):
        picture.save(file)
    text = moesaic.complete(model, processor, "What is it?", images=files[:1], max_new_tokens=6)
    inputs = inputs_of(processor, asked(processor, "What is it?", 1), pictures[:1])
    start = inputs["input_ids"].shape[1]
    ends = questions.ending_tokens(model, processor, "")
    with torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=False, pad_token_id=1)[0, start:]
    assert text == processor.tokenizer.decode(tokens, skip_special_tokens=True)
    some = [Question("What is it?", answer, (file,)) for answer in ("no", "a cup", "yes") for file in files]
    some.append(Question("Which of these?", "the first", tuple(files)))
    one_by_one = [score_choices(model, processor, [one])[0] for one in some]
    assert score_choices(model, processor, some) == pytest.approx(one_by_one, rel=1e-4)
    assert len({round(score, 5) for score in one_by_one}) == len(some)  # pictures are seen
    assert answers(model, processor, some, 4) == [answers(model, processor, [one], 4)[0] for one in some]
    assert ends


@pytest.mark.parametrize("answer", ["no", "a triangle"])
def test_an_answer_counts_whose_first_token_begins_in_the_prompt(ready, answer):
    _, processor = ready
    chat = (Message("user", "What is it?", 1), Message("assistant", answer))
    one = encoded(Document(answer, "chats", messages=chat, pictures=(COFFEE,)), processor)
    assert processor.tokenizer.decode(one.tokens_L[one.is_scored_L]).strip() == f"{answer}</s>"

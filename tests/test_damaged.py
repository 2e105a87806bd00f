"""What is wrong with a model's folder is named in one line, by every verb that opens it, and nothing is left behind."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import moesaic
from moesaic import ConvertConfig, InputError, WorkError
from moesaic.calibration.chat import pieces
from moesaic.calibration.documents import Document, Message
from moesaic.checkpoint.builtin import tiny_folder
from moesaic.checkpoint.claim import real_path
from moesaic.errors import first_line
from moesaic.formats import verify
from moesaic.formats.converted import Converted
from moesaic.models.integrity import check_runs
from moesaic.training.state import RunFolder, TrainingState

SHORT = ("--window", "64", "--max-tokens", "256", "--device", "cpu")


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    base = tmp_path_factory.mktemp("damaged")
    few = ConvertConfig(tokens=512, partition="random", recovery="none", plan="S1A1E4")
    for format in ("glm4_moe", "moesaic"):
        moesaic.convert("tiny", base / format, few.model_copy(update={"format": format}), force=True)
    return base


@pytest.fixture
def dense(tmp_path):
    return shutil.copytree(tiny_folder(), tmp_path / "dense")


@pytest.fixture
def model(converted, tmp_path):
    return lambda name: shutil.copytree(converted / name, tmp_path / name)


def edit(folder, name="config.json", **values):
    path = folder / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | values))


def change(folder, name, by):
    """Change a tensor, in whichever file it is."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors[name] = by(tensors[name])
            save_file(tensors, path, metadata={"format": "pt"})


def refused(run, says, *words, code=2):
    got, out, err = run(*words)
    assert (got, out, err.count("error: ")) == (code, "", 1), err
    assert says in err


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("added_tokens.json", []), ("special_tokens_map.json", 5), ("tokenizer.json", {"model": {"vocab": {"a": "b"}}}),
        ("tokenizer_config.json", {"tokenizer_class": 5}),
    ],
)  # fmt: skip
def test_a_damaged_tokenizer_is_named(run, dense, file, values):
    (dense / file).write_text(json.dumps(values))
    code, out, err = run("evaluate", dense, *SHORT)
    assert (code, out) == (2, ""), err
    assert "no usable tokenizer in" in err


def test_a_configuration_that_only_the_tokenizer_trips_over_is_named(run, dense, converted, tmp_path):
    edit(dense, head_dim=" ")
    refused(run, "no usable tokenizer", "finetune", converted / "glm4_moe", tmp_path / "t", "--teacher", dense)
    assert not (tmp_path / "t.training").exists()


def test_a_chat_template_that_fails_is_named(run, dense):
    edit(dense, "tokenizer_config.json", chat_template="{{ messages[0].nothing.at.all }}")
    refused(run, "chat template fails", "generate", dense, "hi", "--chat")


def test_a_template_may_raise_anything():
    class Tokenizer:
        chat_template = "x"

        def apply_chat_template(self, *arguments, **options):
            raise ZeroDivisionError

    chat = Document("hi", "chats", messages=(Message("user", "hi"), Message("assistant", "yes")))
    with pytest.raises(InputError, match=r"refuses a chat of 'chats' \(ZeroDivisionError\)"):
        pieces(chat, Tokenizer(), "")


@pytest.mark.parametrize("format", ["moesaic", "glm4_moe"])
@pytest.mark.parametrize(
    ("name", "value"),
    [("num_experts", []), ("num_experts", -1), ("num_hidden_layers", 10**9), ("router_hidden_size", 10**18)],
)
def test_impossible_sizes_are_refused_before_anything_is_built(run, model, format, name, value):
    folder = model(format)
    own = json.loads((folder / "config.json").read_text())
    if name in own.get("moesaic", {}):
        own["moesaic"][name] = value
        edit(folder, moesaic=own["moesaic"])
    else:
        edit(folder, **{name: value})
    refused(run, "config.json'", "inspect", folder)


def test_a_stock_folder_without_a_model_type_is_named(run, model):
    folder = model("glm4_moe")
    own = json.loads((folder / "config.json").read_text())
    del own["model_type"]
    (folder / "config.json").write_text(json.dumps(own))
    refused(run, "error: ", "inspect", folder)


def test_architectures_of_any_type_are_shown_as_unknown(model):
    folder = model("moesaic")
    edit(folder, architectures=5)
    assert moesaic.inspect(folder).architecture == "unknown"


def test_a_damaged_generation_config_is_named(run, model):
    folder = model("moesaic")
    (folder / "generation_config.json").write_text("[")
    refused(run, "generation_config.json' is damaged", "evaluate", folder, *SHORT)


def test_a_model_that_loads_and_does_not_run_is_named(dense):
    model, _ = moesaic.load(dense)
    model.model.norm.forward = None
    with pytest.raises(InputError, match="loads but does not run"):
        check_runs(model, dense)


@pytest.mark.parametrize("format", ["moesaic", "glm4_moe"])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.2.input_layernorm.weight"])
def test_export_finds_what_is_no_number_and_leaves_nothing(run, model, tmp_path, format, name):
    folder = model(format)
    change(folder, name, lambda tensor: tensor * torch.nan)
    for out in ("out", "out.gguf"):
        refused(run, f"{name} holds", "export", folder, tmp_path / out)
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith("out")]


def test_logits_that_are_no_numbers_do_not_agree(converted, monkeypatch):
    source = Converted(converted / "moesaic")
    monkeypatch.setattr(verify, "logits", lambda model, tokens_NL: torch.full((4, 32, 1_024), torch.nan))
    with pytest.raises(WorkError, match="NaN or infinite in float32"):
        verify.check(source, converted / "glm4_moe")


def test_gguf_refuses_values_beyond_half_precision(run, model, tmp_path):
    folder = model("moesaic")
    change(folder, "model.layers.1.mlp.experts.down_proj", lambda tensor: tensor * 1e9)
    refused(run, "give --outtype bf16 or f32", "export", folder, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()
    assert run("export", folder, tmp_path / "m.gguf", "--outtype", "bf16")[0] == 0


def test_gguf_refuses_a_template_of_tokens_that_the_model_lacks(run, model, tmp_path):
    folder = model("moesaic")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": 1024, "content": "<|new|>"})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    edit(folder, "tokenizer_config.json", chat_template="<|new|>{{ messages[0].content }}")
    refused(run, "writes '<|new|>', which the model has no embedding for", "export", folder, tmp_path / "m.gguf")


def test_a_benchmark_needs_embeddings_for_its_prompts(folders):
    model, _ = moesaic.load(folders("llama"), dtype=torch.float32)
    with pytest.raises(InputError, match="have token 1024"):
        moesaic.benchmark(model, model, torch.full((1, 8), 1_024))


def test_a_state_that_is_no_file_starts_the_training_anew(tmp_path):
    first = RunFolder(TrainingState, tmp_path / "out", {"model": "a"}, True)
    (first.path / "state.pt").mkdir()
    again = RunFolder(TrainingState, tmp_path / "out", {"model": "a"}, True)
    assert [path.name for path in again.path.iterdir()] == ["fingerprint.json"]


def test_names_that_no_hub_has_are_bad_input(run):
    for name in ("a..b/c", "--/x", "x/y.git", "a/" + "b" * 200):
        refused(run, "error: ", "evaluate", "--device", "cpu", "--", name)


def test_the_root_of_all_folders_is_no_output(run):
    with pytest.raises(InputError, match="nothing can be made beside it"):
        real_path("/")
    refused(run, "choose another folder", "convert", "tiny", "/", "--overwrite", "--dry-run")


def test_another_librarys_error_is_said_in_a_line():
    assert first_line(ValueError("\n  one\ntwo")) == "one"
    assert first_line(ZeroDivisionError()) == "ZeroDivisionError"

"""Engines other than transformers say what the exported model says; `make test-engines` sets them up and runs this.

Each engine has a virtual environment of its own, `.venv-engines/NAME`; one that is not there is a skip that says so.
"""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import FAMILIES, QUICK, SMALL, small_model
from moesaic import convert, export, load
from moesaic.checkpoint.builtin import tiny_folder
from moesaic.formats.gguf.dense import write_dense_gguf

ROOT = Path(__file__).parent.parent
NATIVE_FAMILIES = ["llama", "llama3-rope", "mistral", "qwen2", "qwen3"]
METHODS = {
    "disjoint": {"plan": "S4A2E8"},
    "disjoint, no bias": {"plan": "S4A2E8", "router": "linear:intercept=False"},
    "specialists": {"plan": "S4A1E8", "partition": "specialists"},
}
READ_STOCK = {"vllm", "mlx"}
TEXTS = [
    "The first 12 of 345 numbers, it's said:\n\n    def f(x):\n\treturn x**2  # naïve  ünïcödé 你好 🙂\r\n",
    "  two spaces, don't WE'LL they're\n\n\n...---=== <s> 1234567890",
]
DEMO = ROOT / "demo-output"
PROMPT = "def quicksort(arr):\n"
WIDE = {"hidden_size": 64, "intermediate_size": 256}
"""So that rows are whole blocks of the engines' types."""

pytestmark = pytest.mark.engine


def ask(engine, model, request, folder):
    """What an engine answers."""
    python = ROOT / ".venv-engines" / engine / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{engine} is not set up here: make test-engines ENGINES={engine}")
    (folder / "request.json").write_text(json.dumps(request))
    script = Path(__file__).parent / "engines" / f"run_{engine.replace('.', '_')}.py"
    command = [python, script, model, folder / "request.json", folder / "answer.json"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr[-3_000:]
    return json.loads((folder / "answer.json").read_text())


def save_dense(family, folder):
    """A tiny dense model of sizes that every engine takes; heads of 64 where the family has a size of its own."""
    config_class, extra = FAMILIES[family]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in WIDE.items():
            patch.setitem(SMALL, name, value)
        if "head_dim" in extra:
            patch.setitem(FAMILIES, family, (config_class, extra | {"head_dim": 64}))
        small_model(family).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_folder()).save_pretrained(folder)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """(family, method) -> folder of a stock architecture, made when first asked for."""
    made = {}

    def get(family, method):
        if (family, method) not in made:
            folder = tmp_path_factory.mktemp(family)
            save_dense(family, folder / "dense")
            metrics = convert(folder / "dense", folder / "stock", QUICK.model_copy(update=METHODS[method]))
            assert metrics.format == "glm4_moe"
            made[family, method] = folder / "stock"
        return made[family, method]

    return get


@pytest.fixture(params=["llama.cpp", "mlx", "vllm"])
def engine(request):
    return request.param


def written_for(engine, written, out, outtype="f32"):
    """The model as the engine wants it."""
    if engine in READ_STOCK:
        return written
    export(written, out / "model.gguf", "gguf", outtype=outtype)
    return out / "model.gguf"


@torch.no_grad()
@pytest.mark.parametrize("family", [*NATIVE_FAMILIES, "tied"])
def test_the_dense_model_that_llama_cpp_is_timed_on_is_the_dense_model(family, tmp_path):
    save_dense(family, tmp_path / "dense")
    write_dense_gguf(tmp_path / "dense", tmp_path / "dense.gguf", "f32")
    tokens = [torch.randint(2, 1_024, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (1, 7, 40)]
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    expected = torch.stack([dense(torch.tensor([ids])).logits[0, -1].log_softmax(-1) for ids in tokens])
    request = {"tokens": tokens, "vocab_size": 1_024}
    given = torch.tensor(ask("llama.cpp", tmp_path / "dense.gguf", request, tmp_path)["logprobs"])
    assert (given - expected).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("method", ["disjoint", "specialists"])
@pytest.mark.parametrize("family", NATIVE_FAMILIES)
def test_log_probabilities_are_those_of_transformers(converted, engine, family, method, tmp_path):
    if (engine, family) == ("mlx", "llama3-rope"):
        pytest.skip("mlx: its architectures do not scale rope")
    scaled = (engine, family) == ("llama.cpp", "llama3-rope")
    written = converted(family, "disjoint, no bias" if scaled and method == "disjoint" else method)
    if scaled:  # what llama.cpp scales rope for
        export(written, tmp_path / "granite", "granitemoeshared")
        written = tmp_path / "granite"
    model = written_for(engine, written, tmp_path)
    tokens = [torch.randint(2, 1_024, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (1, 7, 40)]
    stock = AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32).eval()
    expected = torch.stack([stock(torch.tensor([ids])).logits[0, -1].log_softmax(-1) for ids in tokens])
    given = torch.tensor(ask(engine, model, {"tokens": tokens, "vocab_size": 1_024}, tmp_path)["logprobs"])
    differences = (given - expected).abs().amax(-1)
    print(engine, family, method, differences.tolist())
    assert differences.max() < 1e-4


def test_llama_cpps_tokenizer_is_that_of_transformers(converted, tmp_path):
    written = converted("qwen2", "specialists")
    tokenizer = AutoTokenizer.from_pretrained(written)
    found = ask("llama.cpp", written_for("llama.cpp", written, tmp_path), {"texts": TEXTS}, tmp_path)["ids"]
    assert found == [tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.mark.parametrize("outtype", ["f16", "bf16", "q8_0"])
@torch.no_grad()
def test_llama_cpp_reads_every_type(converted, tmp_path, outtype):
    written = converted("qwen2", "specialists")
    model = written_for("llama.cpp", written, tmp_path, outtype)
    tokens = [[5, 9, 200, 17]]
    stock = AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32).eval()
    expected = stock(torch.tensor(tokens)).logits[0, -1].log_softmax(-1)
    given = torch.tensor(ask("llama.cpp", model, {"tokens": tokens, "vocab_size": 1_024}, tmp_path)["logprobs"][0])
    assert (given - expected).norm() / expected.norm() < 0.05


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("qwen2", {"plan": "S4A2E8", "router": "representative"}),
        ("olmo2", {"plan": "S4A2E8"}),
        ("gemma3", {"plan": "S4A1E8", "partition": "specialists"}),
    ],
)
def test_vllm_runs_the_working_form_by_our_plug_in(tmp_path, family, settings):
    save_dense(family, tmp_path / "dense")
    assert convert(tmp_path / "dense", tmp_path / "out", QUICK.model_copy(update=settings)).format == "moesaic"
    tokens = [[5, 9, 200, 17], list(range(30, 60))]
    model, _ = load(tmp_path / "out", dtype=torch.float32)
    expected = torch.stack([model(torch.tensor([ids])).logits[0, -1].log_softmax(-1) for ids in tokens])
    given = torch.tensor(ask("vllm", tmp_path / "out", {"tokens": tokens, "vocab_size": 1_024}, tmp_path)["logprobs"])
    assert (given - expected).abs().max() < 1e-4


@torch.no_grad()
def test_the_demo_says_the_same_text(engine, tmp_path):
    if not (DEMO / "config.json").is_file():
        pytest.skip("there is no demo-output: make demo")
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    stock = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    tokens = stock.generate(**inputs, max_new_tokens=32, do_sample=False, repetition_penalty=1.0)[0]
    expected = tokenizer.decode(tokens[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    model = written_for(engine, DEMO, tmp_path)
    request = {"prompt": PROMPT, "new": 32, "vocab_size": stock.config.vocab_size, "threads": 2}
    assert ask(engine, model, request, tmp_path)["text"] == expected

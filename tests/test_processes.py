"""Processes that are killed for good, that want the same output, and that share a cache."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer

import moesaic
from conftest import small_model
from moesaic import FinetuneConfig, InputError
from moesaic.calibration.text import bundled
from moesaic.checkpoint.builtin import tiny_folder
from moesaic.checkpoint.reader import Checkpoint
from moesaic.config import ConvertConfig
from moesaic.formats.converted import Converted
from moesaic.models.tokenizer import load_tokenizer
from moesaic.training.data import make_samples
from moesaic.training.teacher import Teacher
from test_sources import write_gguf

QUICK = ConvertConfig(partition="random", tokens=512, plan="S1A2E8")
SHORT = FinetuneConfig(
    method="router", window=64, samples=64, batch=4, held_out=8, steps=8, evaluations=4, teacher="tiny", device="cpu"
)  # fmt: skip
CONVERT = ("convert", "tiny", "out", "--partition", "random", "--tokens", "512", "--plan", "S1A2E8")
FINETUNE = ("finetune", "converted", "out", "--recipe", "recipe.yaml")


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes") / "converted"
    moesaic.convert("tiny", folder, QUICK)
    return folder


def started(arguments, folder):
    """Start the command line in a folder, as a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "moesaic.cli", *arguments], cwd=folder, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def wait_for(process, path):
    """Wait until a process has made a file, and stop it there."""
    end = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, f"no {path}"
        time.sleep(0.002)
    process.send_signal(signal.SIGSTOP)


def tensors(folder):
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.names()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("file", ["model-layer-00001.safetensors", "model-layer-00002.safetensors"])
def test_a_conversion_holds_its_output_until_it_is_killed_and_goes_on(converted, tmp_path, file):
    out = tmp_path / "out"
    process = started(CONVERT, tmp_path)
    wait_for(process, tmp_path / "out.partial" / file)
    try:
        with pytest.raises(InputError, match=f"in use by process {process.pid}"):
            moesaic.convert("tiny", out, QUICK)
        with pytest.raises(InputError, match=f"in use by process {process.pid}"):
            moesaic.finetune(converted, out, SHORT)
        assert not out.exists()
    finally:
        process.kill()
        process.communicate()
    seen = []
    moesaic.convert("tiny", out, QUICK, progress=lambda done, count, note: seen.append(done))
    assert seen[0] > 0  # it went on
    assert same(tensors(out), tensors(converted))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_training_holds_its_output_until_it_is_killed_and_goes_on(converted, tmp_path):
    (tmp_path / "converted").symlink_to(converted)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(SHORT.model_dump(mode="json")))
    moesaic.finetune(converted, tmp_path / "whole", SHORT)
    process = started(FINETUNE, tmp_path)
    wait_for(process, tmp_path / "out.training" / "state.pt")
    try:
        with pytest.raises(InputError, match=f"in use by process {process.pid}"):
            moesaic.finetune(converted, tmp_path / "out", SHORT)
    finally:
        process.kill()
        process.communicate()
    steps = []
    moesaic.finetune(converted, tmp_path / "out", SHORT, progress=lambda done, count, note: steps.append(note))
    assert not steps or not steps[0].startswith("step 1,")  # it went on
    assert same(tensors(tmp_path / "out"), tensors(tmp_path / "whole"))
    assert {path.name for path in tmp_path.iterdir()} == {"converted", "recipe.yaml", "whole", "out"}


def test_three_processes_dequantise_a_gguf_at_once(tmp_path):
    """Each gets the whole folder, and one of them makes it."""
    write_gguf(tmp_path / "m.gguf", small_model("qwen2"), AutoTokenizer.from_pretrained(tiny_folder()))
    code = "import sys; from moesaic.checkpoint.sources import resolve; print(resolve(sys.argv[1]))"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "m.gguf")], text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env=os.environ | {"MOESAIC_CACHE": str(tmp_path / "cache")},
        ) for _ in range(3)
    ]  # fmt: skip
    told = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], told
    [folder] = {out.strip() for out, _ in told}
    assert sum("Dequantising" in error for _, error in told) == 1
    assert load_file(f"{folder}/model.safetensors")
    assert not list((tmp_path / "cache" / "dequantised").glob("*.partial"))


def test_three_teachers_share_a_teachers_cache(converted, tmp_path):
    """Nobody reads what is half-written, and nothing half-written stays."""
    tokenizer, student = load_tokenizer(converted), Converted(converted).config
    train, _ = make_samples(bundled("calibration"), tokenizer, 24, 32, 2, seed=0)

    teachers = [Teacher("tiny", student, tokenizer, 8, torch.device("cpu"), torch.float32) for _ in range(3)]
    for teacher in teachers:
        teacher.keep_in(tmp_path, train)
        assert teacher.model  # loaded, which threads cannot do at once
    with ThreadPoolExecutor(3) as pool:
        one, two, three = pool.map(
            lambda t: [t.top(train.take(torch.tensor([i])))[0] for i in range(len(train))], teachers
        )
    for others in (two, three):
        assert all(torch.allclose(a, b, atol=1e-2) for a, b in zip(one, others, strict=True))
    [folder] = tmp_path.iterdir()
    assert {path.suffix for path in folder.glob("[0-9]*")} == {".safetensors"}
    assert len(list(folder.glob("[0-9]*"))) == 24

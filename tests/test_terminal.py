"""What a terminal and a shell meet: names as they are, commands to paste, signals, pipes, other encodings."""

import fcntl
import io
import json
import os
import pty
import re
import shlex
import signal
import struct
import subprocess
import sys
import termios
import time
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from rich.text import Text

import moesaic
from moesaic import ConvertConfig
from moesaic.checkpoint.builtin import tiny_folder
from moesaic.cli.options import status
from moesaic.cli.signals import Stopped, stoppable
from moesaic.evaluation.inspect import prompt_tokens
from moesaic.formats.gguf.dense import write_dense_gguf
from moesaic.report import tables
from moesaic.report.card import commands
from moesaic.report.console import command, here, offer, plain_console
from moesaic.report.frontier_table import show_frontier
from moesaic.report.plans import show_plans
from moesaic.report.progress import progress
from moesaic.results import (
    EvaluationResult,
    ExpertLoad,
    FinetuneResult,
    FrontierResult,
    FrontierSummary,
    LoadChange,
    TaskScore,
)

COMMAND = [sys.executable, "-m", "moesaic.cli"]
LONG = "/data/models/[red]of[/red]/[/x]/some-organisation-with-a-name/a-model-of-seventy-billion-parameters-instruct-v2"
FAST = ConvertConfig(tokens=512, partition="random", recovery="none")
QUICK = ("--partition", "random", "--recovery", "none", "--tokens", "512", "--force")


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    out = tmp_path_factory.mktemp("terminal") / "out"
    return out, moesaic.convert("tiny", out, FAST, force=True)


def shown(show, *results, width=80):
    """What is printed, by a console that would take brackets for styles."""
    console = Console(file=io.StringIO(), width=width)
    show(console, *results)
    return console.file.getvalue()


def holds(text, name):
    """Whether the name is there, folded over lines of a table or not."""
    return name in re.sub(r"[\s│┃|]", "", text)


def test_names_in_brackets_are_printed_as_they_are(run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("[/x]", "a[b]", "[red]x[/red]", ":cat:"):
        code, _, err = run("convert", "tiny", name, *QUICK)
        assert code == 0, err
        assert f"{name}: plan" in err
        [offered] = [line for line in err.splitlines() if "moesaic generate" in line]
        assert shlex.split(offered)[:3] == ["moesaic", "generate", name]
        code, _, err = run("inspect", name)
        assert (code, name in err) == (0, True)
    code, _, err = run("generate", "[/y]", "hi")
    assert code == 2
    assert "no model '[/y]'" in err


def test_bars_and_notes_are_printed_as_they_are(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    with progress(console, "[/x]", "[/layer]") as tick:
        tick(1, 2, "[red]note[/red] [/]")
    assert "[red]note[/red] [/]" in console.file.getvalue()
    console = Console(file=io.StringIO(), width=80, force_terminal=True)  # which takes brackets for styles
    monkeypatch.setattr("moesaic.cli.options.stderr", console)
    with status("loading [/x] [red]model[/red]"):
        time.sleep(0.2)
    assert "loading [/x] [red]model[/red]" in console.file.getvalue()
    assert plain_console().render_str("[red]x[/red] :cat:").plain == "[red]x[/red] :cat:"


def trained():
    load = ExpertLoad(coefficient_of_variation=0.5, dead_experts=3, experts_per_token=8.0)
    return FinetuneResult(
        method="my_methods:WithAVeryLongName:width=128,ridge=0.001", objective="both", held_out_loss_before=3.1,
        held_out_loss=3.0, held_out_tokens=100, steps=100_000, best_step=9, tokens=10**9, seconds=1e5, processes=1,
        load=LoadChange(before=load, after=load), improved=False, trainable_parameters={"router": 10**9},
        output=LONG, perplexity_dense=10.0, perplexity_before=1e6, perplexity=1e6, format="moesaic",
        format_reason=LONG,
    )  # fmt: skip


def frontier_of(name):
    row = FrontierSummary(
        method="static-weighted+closed-form", active=0.25, ffn_active=0.25, memory_factor=1.0, memory=1.0,
        plan="S32A32E128", partition=None, speedup=1.5, perplexity_ratio=17.7, perplexity_ratio_deviation=0.1, seeds=3,
        tasks_mean=0.4, tasks_stderr=0.02,
    )  # fmt: skip
    dense = EvaluationResult(
        perplexity=32.1, protocol="gptq", tokens=40_960, window=2_048, text=name, data_sha256="a" * 64,
        tasks={name: TaskScore(acc=0.5, acc_norm=0.5, stderr=0.1, n=1_000)}, dtype="float32", versions={},
    )  # fmt: skip
    found = FrontierResult(
        setting={"model": name}, versions={}, machine="", rows=[], dense=dense, unfit={"cmoe": name}, speeds=[],
        summary=[row],
    )  # fmt: skip
    return found, dense


def test_every_table_fits_eighty_columns_with_long_names_in_brackets(converted):
    out, result = converted
    model, tokenizer = moesaic.load(out, dtype=torch.float32)
    speed = moesaic.benchmark(model, model, prompt_tokens(tokenizer, 32, 2), new=1, batches=[1, 2], rounds=1)
    fast = replace(speed.decode["1"], tokens_per_s=123_456.7, tokens_per_s_range=[123_456.7, 999_999.9])
    speed = replace(speed, machine=LONG, decode={"4096": fast, "1": fast}, block={"512": fast})
    frontier, evaluation = frontier_of(LONG)
    plans = moesaic.plans("tiny")
    plans = replace(plans, model=LONG, choices=[replace(c, gguf=["q4_k in part"]) for c in plans.choices])
    cases = [
        (tables.show_conversion, replace(result, output=LONG, collapsed=True, partition="my_methods:" + "A" * 90)),
        (tables.show_training, trained()), (show_plans, plans), (tables.show_evaluation, evaluation),
        (tables.show_benchmark, speed), (show_frontier, frontier, LONG),
        (tables.show_inspection, replace(moesaic.inspect(out), folder=LONG, model=LONG)),
        (tables.show_facts, LONG, {"output": LONG, "bytes": 10**12}),
    ]  # fmt: skip
    for show, *results in cases:
        text = shown(show, *results)
        lines = [line for line in text.splitlines() if LONG not in line]  # a path in a command stays whole
        assert max(map(len, lines)) <= 80, f"{show.__name__}\n{text}"
        assert "…" not in text, f"{show.__name__}\n{text}"
        assert holds(text, LONG), f"{show.__name__}\n{text}"


def pasted(text):
    """The commands in a text, as a shell reads them."""
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.strip().startswith("moesaic ")]


@pytest.mark.parametrize("name", ["my models/out [v2]", "it's $HOME `x`", 'a"b', "-x", "~x", "*;rm -r", LONG])
def test_printed_commands_can_be_pasted(converted, name):
    _, result = converted
    text = shown(tables.show_conversion, replace(result, output=name))
    assert "--against" not in text
    local = pasted(shown(tables.show_conversion, result, name))[-1]
    assert local == ["moesaic", "benchmark", here(result.output), "--against", here(name)]
    assert pasted(text)[0] == ["moesaic", "generate", here(name), "def quicksort(arr):"]
    assert pasted(shown(show_plans, replace(moesaic.plans("tiny"), model=name)))[0][2] == here(name)
    found = {engine: shlex.split(line) for engine, line in commands(name).items()}
    assert found["vllm"] == ["vllm", "serve", here(name)]
    assert len(found["mlx"]) == 8
    compile(found["transformers"][2], "card", "exec")
    assert f"({json.dumps('text-generation')}, {json.dumps(here(name))})" in found["transformers"][2]


def test_a_long_command_goes_on_in_the_next_line():
    words = ["moesaic", "convert", "tiny", "OUT", "--partition", "specialists", "--plan", "S1A1E4", "a b", "x" * 90]
    console = Console(file=io.StringIO(), width=40)
    offer(console, command(*words), "  ")
    text = console.file.getvalue()
    assert pasted(text) == [words]
    assert max(len(line) for line in text.splitlines() if "xxx" not in line) <= 40


def test_a_models_card_can_be_pasted(run, tmp_path):
    (tmp_path / "my models").mkdir()
    out = tmp_path / "my models" / "out [v2]"
    assert run("convert", "tiny", out, *QUICK)[0] == 0
    lines = (out / "README.md").read_text().splitlines()
    assert shlex.split(next(line for line in lines if line.startswith("vllm"))) == ["vllm", "serve", "out [v2]"]
    assert 'pipeline("text-generation", "out [v2]")' in "\n".join(lines)
    assert "`moesaic export 'out [v2]' 'out [v2].gguf' --format gguf`" in "\n".join(lines)


def start(*arguments, cwd):
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # which pytest-xdist ignores
    )  # fmt: skip


@pytest.mark.parametrize(
    ("number", "code", "says"),
    [
        (signal.SIGINT, 130, "interrupted; the same command goes on where it stopped\n"),
        (signal.SIGTERM, 143, "terminated; the same command goes on where it stopped\n"),
    ],
)
def test_signals_end_the_work_with_a_line(tmp_path, number, code, says):
    process = start("convert", "tiny", "out", "--partition", "coactivation", cwd=tmp_path)
    while not (tmp_path / "out.partial" / "model-layer-00000.safetensors").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate()
    assert (process.returncode, out) == (code, "")
    assert err.endswith(says)
    assert "Traceback" not in err


def test_ctrl_c_is_heard_while_libraries_are_imported(tmp_path):
    process = start("generate", "tiny", "hi", cwd=tmp_path)
    time.sleep(0.7)
    process.send_signal(signal.SIGINT)
    assert process.communicate() == ("", "interrupted\n")
    assert process.returncode == 130


def test_a_signal_that_a_callback_swallows_comes_again():
    class Deaf:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)
            time.sleep(0)

    def work():
        with stoppable():
            Deaf()
            time.sleep(5)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped) as caught:
        work()
    assert caught.value.code == 130
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["convert", "tiny", "out"], "interrupted; the same command goes on where it stopped"),
        (["frontier", "tiny"], "interrupted; the same command goes on where it stopped"),
        (["finetune", "m", "t", "--no-resume"], "interrupted; the same command without --no-resume goes on"),
        (["export", "m", "m.gguf"], "interrupted"),
        (["convert", "tiny", "out", "--dry-run"], "interrupted"),
        (["generate", "tiny", "hi"], "interrupted"),
    ],
)
def test_only_what_is_kept_goes_on(monkeypatch, argv, says):
    monkeypatch.setattr(sys, "argv", ["moesaic", *argv])
    found = str(Stopped(signal.SIGINT))
    assert found.startswith(says)
    assert ("goes on" in found) == ("goes on" in says)


@pytest.mark.parametrize(
    ("shell", "code"),
    [
        ("$M inspect OUT --json | true", 0),
        ("$M inspect OUT >&- 2>&-", 0),
        ("$M inspect OUT --json > /dev/full", 1),
        ("NO_COLOR=1 TERM=dumb $M inspect OUT", 0),
        ("LC_ALL=C PYTHONIOENCODING=ascii $M generate tiny Ω --max-new-tokens 2", 0),
    ],
)
@pytest.mark.slow
def test_no_state_of_the_streams_is_a_traceback(converted, shell, code):
    line = shell.replace("$M", shlex.join(COMMAND)).replace("OUT", str(converted[0]))
    done = subprocess.run(["bash", "-c", line], capture_output=True, check=False)
    assert done.returncode == code, done.stderr
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr


def in_a_terminal(*arguments, columns=80):
    """What a command writes in a terminal of so many columns, without the terminal's own codes."""
    pid, terminal = pty.fork()
    if pid == 0:
        environment = os.environ | {"COLUMNS": str(columns), "TERM": "xterm"}
        os.execve(sys.executable, [*COMMAND, *map(str, arguments)], environment)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    written = b""
    while True:
        try:
            part = os.read(terminal, 65_536)
        except OSError:  # so Linux says that the other end is closed
            break
        if not part:
            break
        written += part
    os.waitpid(pid, 0)
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.decode()))


@pytest.mark.slow
def test_finetune_is_readable_in_eighty_columns(converted, tmp_path):
    few = ("--steps", "3", "--window", "64", "--samples", "24", "--device", "cpu")
    lines = in_a_terminal("finetune", converted[0], tmp_path / "t", *few)
    bars = [line for line in lines if line.startswith("training ")]
    assert bars
    assert all(re.search(r"\d+/100 per cent .* left step \d", line) for line in bars)
    assert all(Text(line.rstrip()).cell_len <= 80 for line in lines)
    known = re.compile(r"training |[┏┃┡│└]|learned: |tokens in|.*: lora|held-out loss|written as|\S*/t|$|[^ ]+:")
    assert [line for line in lines if not known.match(line.strip())] == []


def test_no_bar_of_a_library_is_seen_where_a_gguf_is_read(run, monkeypatch, tmp_path):
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path / "cache"))
    write_dense_gguf(tiny_folder(), tmp_path / "dense.gguf", "f16")
    for words in (["generate", "FILE", "hi", "--max-new-tokens", "1"], ["convert", "FILE", "OUT", "--dry-run"]):
        places = {"FILE": tmp_path / "dense.gguf", "OUT": tmp_path / "out"}
        code, _, err = run(*(places.get(word, word) for word in words))
        assert code == 0, err
        assert "it/s" not in err
        (tmp_path / "cache").rename(tmp_path / f"read by {words[0]}")

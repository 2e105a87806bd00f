"""What people look at: the frontier's chart and page, the demo's screen and page, progress; all without matplotlib."""

import io
import json
import logging
import os
import shutil
import sys
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from rich.console import Console
from tqdm import tqdm

from moesaic import InputError, convert
from moesaic import demo as demo_module
from moesaic.checkpoint.builtin import tiny_folder
from moesaic.comparison.frontier import Measurement, frontier, read_frontier
from moesaic.comparison.llama_cpp import find_llama_cpp, llama_cpp_speed
from moesaic.config import ConvertConfig
from moesaic.demo import Steps, demo
from moesaic.formats.gguf.dense import write_dense_gguf
from moesaic.report import plots
from moesaic.report.demo import TRAINED, next_commands, show_demo
from moesaic.report.frontier import MOST_LINES, chosen_lines, lines_of, spread
from moesaic.report.frontier_page import write_frontier_page
from moesaic.report.frontier_plot import draw_frontier, write_frontier
from moesaic.report.plots import write_plots
from moesaic.report.progress import progress
from moesaic.results import FrontierSummary

ROOT = Path(__file__).parent.parent
CHARTS = sorted(path.parent for path in (ROOT / "benchmarks" / "results").rglob("frontier.svg"))
VOID = {"meta", "input", "line", "polyline", "rect", "circle"}


def row(method, active, ratio, factor=1.0, speedup=None):
    return FrontierSummary(
        method=method, active=active, ffn_active=active, memory_factor=factor, memory=factor, plan="S1A1E8",
        partition=None, speedup=speedup, perplexity_ratio=ratio, perplexity_ratio_deviation=0.0, seeds=1,
    )  # fmt: skip


def crowd(speedup=None):
    """More methods than the chart takes, three of them nearly the same."""
    ratios = {"specialists": 1.50, "coactivation": 1.51, "coactivation-fine": 1.52, "static+closed-form": 3, "flap": 5,
              "cmoe": 5.05, "moefication": 5.1, "neurons": 1.0, "expertweaver": 90}  # fmt: skip
    found = [row(m, a, 1 + (r - 1) * (1 - a), 1.0, speedup) for m, r in ratios.items() for a in (0.25, 0.5)]
    return [*found, row("specialists", 0.25, 1.3, 4.0, speedup), row("specialists", 0.5, 1.2, 4.0, speedup)]


class Page(HTMLParser):
    """The text of a page, its tags that nobody closed, and what it would fetch."""

    def __init__(self, text):
        super().__init__()
        self.words, self.open, self.fetched = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.fetched += [value for name, value in attrs if name in {"src", "href"}]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def read(path):
    page = Page(path.read_text())
    assert page.open == []
    assert page.fetched == []
    return " ".join(page.words)


@given(st.lists(st.floats(-10, 10), max_size=12), st.floats(0.01, 5))
def test_labels_move_apart_and_keep_their_order(wanted, gap):
    placed = spread(wanted, gap)
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    for a, b in pairwise(order):
        assert placed[b] - placed[a] >= gap * 0.999
    if all(wanted[b] - wanted[a] >= gap for a, b in pairwise(order)):
        assert placed == pytest.approx(wanted)


def test_the_printed_lines_are_few_and_chosen_by_the_rule():
    names = [(line.method, line.memory_factor) for line in chosen_lines(lines_of(crowd()))]
    assert names == [("specialists", 1), ("coactivation", 1), ("specialists", 4), ("static+closed-form", 1),
                     ("flap", 1), ("cmoe", 1)]  # fmt: skip


def test_of_ours_one_that_is_no_slower_than_dense_is_printed():
    rows = [row("coactivation-fine", 0.5, 1.2, speedup=0.6), row("coactivation", 0.5, 1.3, speedup=0.9)]
    rows += [row("specialists", 0.5, 1.4, speedup=1.3)]
    assert {line.method for line in chosen_lines(lines_of(rows))} == {"coactivation-fine", "specialists"}


@pytest.mark.parametrize("folder", [None, "speed", *CHARTS], ids=lambda f: f.name if isinstance(f, Path) else str(f))
def test_a_chart_is_read_at_once(folder):
    result = read_frontier(folder / "frontier.json") if isinstance(folder, Path) else None
    summary, siblings = (result.summary, result.siblings) if result else (crowd(1.2 if folder else None), [])
    figure = draw_frontier(summary, "a model", siblings)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    page = figure.bbox
    assert not figure.legends
    for panel in figure.axes:
        assert panel.get_legend() is None
        assert len(panel.containers) <= MOST_LINES
        labels = [Text.get_window_extent(text, canvas.get_renderer()) for text in panel.texts]  # without the leader
        for i, box in enumerate(labels):
            assert page.x0 <= box.x0 < box.x1 <= page.x1
            assert page.y0 <= box.y0 < box.y1 <= page.y1
            assert not any(box.overlaps(other) for other in labels[:i])
    names = 1 + len(figure.axes[0].containers) + len(siblings)  # "dense", each line and each smaller dense model
    assert len(figure.axes[0].texts) == names


def test_the_same_rows_give_the_same_files(tmp_path):
    files = []
    for name in "ab":
        (tmp_path / name).mkdir()
        write_frontier(crowd(), "a model", tmp_path / name)
        files.append([(tmp_path / name / f"frontier.{kind}").read_bytes() for kind in ("png", "svg")])
    assert files[0] == files[1]


def test_the_frontiers_page_has_every_number(tmp_path):
    result = read_frontier(ROOT / "benchmarks" / "results" / "quality-gemma-270m" / "frontier.json")
    write_frontier_page(result, tmp_path / "frontier.html", "<gemma>")
    text = read(tmp_path / "frontier.html")
    assert "<gemma> as a Mixture-of-Experts" in text
    for one in result.summary:
        assert f"{one.perplexity_ratio:.3f}" in text
        assert one.speedup is None or f"{one.speedup:.2f} ×" in text
    html = (tmp_path / "frontier.html").read_text()
    assert html.count('type="checkbox"') == len(lines_of(result.summary))
    assert html.count("checked>") == len(chosen_lines(lines_of(result.summary)))


def test_frontier_writes_its_page_when_asked(tmp_path):
    measurement = Measurement(tokens=1_024, max_tokens=2_048, speed=False)
    result = frontier("tiny", tmp_path, active=[0.25], methods=["neurons"], measurement=measurement, html=True)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".png", ".svg", ".html"}
    assert f"{result.summary[0].perplexity_ratio:.3f}" in read(tmp_path / "frontier.html")


def test_without_matplotlib_plots_are_left_out_with_one_line(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    plots._say_missing.cache_clear()
    with caplog.at_level(logging.WARNING):
        write_plots({"layers": []}, tmp_path)
        write_frontier(crowd(), "a model", tmp_path)
    plots._say_missing.cache_clear()
    assert [record.message for record in caplog.records] == [f"plots are left out: {plots.MISSING}"]
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match=r"pip install 'moesaic\[plots\]'"):
        plots.write_roofline({}, tmp_path / "roofline.png")


def terminal(width=80):
    return Console(file=io.StringIO(), force_terminal=True, width=width)


def test_progress_keeps_the_time_left_in_eighty_columns_and_silences_other_bars(capsys):
    console = terminal()
    with progress(console, "demo", "%", "") as tick:
        tick(12, 100, "trying coactivation S10A9E38 and whatever else there is to be said of it")
        for _ in tqdm(range(3)):
            pass
    line = [part for part in console.file.getvalue().replace("\r", "\n").split("\n") if "demo" in part][-1]
    assert "12/100" in line
    assert "left" in line
    assert capsys.readouterr().err == ""
    for _ in tqdm(range(3), desc="afterwards"):
        pass
    assert "afterwards" in capsys.readouterr().err


def test_progress_writes_plain_lines_where_there_is_no_terminal():
    console = Console(file=io.StringIO(), width=80)
    with progress(console, "converting", "layer") as tick:
        for done in range(4):
            tick(done, 3, "")
    assert console.file.getvalue() == "converting: 0 of 3 layers\n"


def test_the_demos_bar_never_goes_back():
    seen = []
    steps = Steps(lambda done, count, note: seen.append(done))
    for trial in ("one", "two", "three"):
        for done in range(24):
            steps.converting(done, 24, f"trying {trial}")
    for done in range(25):
        steps.converting(done, 24, "layer error 0.1")
    for part in ("speed", "typed", "llama.cpp"):
        for share in (0, 0.5, 1):
            steps.report(part, share, part)
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == (0, 100)


FAKE = """
import json
class CommonParams:
    def __init__(self):
        self.model, self.cpuparams, self.cpuparams_batch = (type("Any", (), {})() for _ in range(3))
class Server:
    def __init__(self, params):
        self.slow = 2 if "dense" in params.model.path else 1
        assert open(params.model.path, "rb").read(4) == b"GGUF"
    def handle_completions(self, body):
        return {"timings": {"prompt_per_second": 30.0 / self.slow, "predicted_per_second": 6.0 / self.slow}}
"""


@pytest.fixture
def fake_llama_cpp(tmp_path_factory, monkeypatch):
    """This Python, with a module in place of xllamacpp that says how fast it was."""
    folder = tmp_path_factory.mktemp("fake")
    (folder / "xllamacpp.py").write_text(FAKE)
    (folder / "xllamacpp-1.0.dist-info").mkdir()
    (folder / "xllamacpp-1.0.dist-info" / "METADATA").write_text("Name: xllamacpp\nVersion: 1.0\n")
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    return Path(sys.executable)


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """A demo of `tiny`, with fewer calibration tokens."""
    out = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_module, "TOKENS", 2_048)
        patch.setattr(demo_module, "PARTITIONS", {"tiny": "coactivation"})
        patch.setattr(demo_module, "PROMPT", 32)
        patch.setattr("moesaic.comparison.llama_cpp.find_spec", lambda name: None)
        return out, demo(out, "tiny")


def test_the_demo_leaves_numbers_page_and_plots(shown):
    out, result = shown
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics == json.loads(json.dumps(result.to_dict()))
    assert {"output", "plan", "perplexity", "layers", "decode", "prefill", "block", "typed"} <= metrics.keys()
    assert {"layer_error.png", "expert_load.png", "speed.png"} <= {path.name for path in out.iterdir()}
    text = read(out / "report.html")
    for expected in (
        f"{result.conversion.perplexity:.2f}",
        result.typed[1].converted.split("\n")[0],
        "pip install xllamacpp",
        "--active 0.5",
    ):
        assert expected.strip() in text


def test_a_demo_replaces_demos_alone(shown, tmp_path):
    out = shutil.copytree(shown[0], tmp_path / "mine")
    (out / "report.html").unlink()  # as any other conversion
    before = sorted((path.name, path.stat().st_mtime_ns) for path in out.iterdir())
    with pytest.raises(InputError, match="exists"):
        demo(out, "tiny")
    assert sorted((path.name, path.stat().st_mtime_ns) for path in out.iterdir()) == before


def test_the_demo_recommends_no_smaller_share(shown):
    assert any("three quarters" in why for _, why in next_commands(shown[1]))
    assert not any("three quarters" in why for _, why in next_commands(replace(shown[1], active=1.0)))


def test_the_demo_says_what_good_was_measured_to_win(shown):
    rows = json.loads((ROOT / "benchmarks/results/recovery-demo/recovery.json").read_text())["rows"]
    measured = [round(rows[name]["ratio"]["wikitext2"], 2) for name in ("S2A2E8-ours-0", "S2A2E8-both-15")]
    assert list(TRAINED["demo"]) == measured
    (line, why), *_ = [pair for pair in next_commands(replace(shown[1], model="demo")) if "--effort" in pair[0]]
    assert line == "moesaic convert demo good --effort good"
    assert f"took {measured[0]} times dense to {measured[1]} (WikiText-2)" in why


@pytest.mark.parametrize("width", [80, 200])
def test_the_demos_screen_is_eighty_columns_wide_and_says_what_is_bad(shown, width):
    out, result = shown
    speed = result.speed.decode["1"]
    slow = replace(result, speed=replace(result.speed, decode={"1": replace(speed, speedup=0.5)}))
    console = Console(file=io.StringIO(), width=width)
    show_demo(console, slow)
    text = console.file.getvalue()
    assert max(map(len, text.split("\n"))) <= 80
    assert "- Writing text in transformers is slower: 0.50x the dense model's speed." in text
    for typed in result.typed:
        assert typed.prompt.split("\n")[0] in text
    assert "pip install xllamacpp" in text
    assert f"{out}/report.html" in text.replace("\n", "")


def test_llama_cpp_is_asked_in_the_python_that_has_it(fake_llama_cpp, tmp_path):
    convert("tiny", tmp_path / "out", ConvertConfig(partition="coactivation", tokens=1_024, window=64))
    found = llama_cpp_speed("tiny", tmp_path / "out", [1, 2, 3], find_llama_cpp(fake_llama_cpp), new=4, rounds=2)
    assert found.decode.to_dict() == {"tokens_per_s": 6.0, "dense_tokens_per_s": 3.0, "speedup": 2.0}
    assert (found.prefill.speedup, found.version, found.prompt) == (2.0, "xllamacpp 1.0", 3)
    assert not list((tmp_path / "out").glob("gguf-*"))


def test_a_python_without_llama_cpp_is_bad_input(tmp_path):
    with pytest.raises(InputError, match="is no Python"):
        find_llama_cpp(tmp_path / "python")
    with pytest.raises(InputError, match="-m pip install xllamacpp"):
        find_llama_cpp(Path("/usr/bin/false"))


def test_a_dense_gguf_has_every_tensor(tmp_path):
    write_dense_gguf(tiny_folder(), tmp_path / "dense.gguf", "f16")
    reader = gguf.GGUFReader(tmp_path / "dense.gguf")
    names = {tensor.name for tensor in reader.tensors}
    assert {"token_embd.weight", "output_norm.weight", "blk.3.ffn_down.weight", "blk.0.attn_q.weight"} <= names
    assert len(names) == 2 + 4 * 9


def test_the_demo_shows_what_was_measured_unless_asked_otherwise():
    assert demo_module.shown("tiny", None).active == 0.5
    assert demo_module.shown("demo", None) == demo_module.shown("demo", 0.625)
    assert demo_module.shown("demo", None).plan
    assert demo_module.shown("demo", 0.25) == (0.25, None)
    for active in (None, 0.25):
        config = demo_module.shown_config("demo", active)
        assert (config.active is None) == (config.plan is not None)

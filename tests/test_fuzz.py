"""Random options and damaged models: every verb ends with a result, or with one line of ours and exit code 1 or 2.

The same inputs each time. `MOESAIC_FUZZ=N` tries N times as many, other ones each time; all faults are listed together.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest
import typer
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import damage
import moesaic
from moesaic import ConvertConfig, cli
from moesaic.checkpoint.builtin import tiny_folder
from moesaic.formats.gguf.dense import write_dense_gguf

TIMES = int(os.environ.get("MOESAIC_FUZZ", "1"))
LONGEST_SECONDS = 120  # of a machine that is busy with other tests
FEW = {"tokens": 512, "partition": "random", "recovery": "none"}
ENGINE = settings(
    derandomize=TIMES == 1, deadline=None, database=None, suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
)  # fmt: skip
SCORE = "--window 64 --max-tokens 256 --device cpu --json"
TRAIN = "--steps 1 --samples 24 --window 64 --device cpu --json"
ANY = (f"evaluate MODEL {SCORE}", "generate MODEL hi --max-new-tokens 2 --device cpu --json",
       "generate MODEL hi --max-new-tokens 2 --chat --device cpu --json",
       "benchmark MODEL --against tiny --prompt 8 --new 2 --rounds 1 --device cpu --json")  # fmt: skip
DENSE = ("convert MODEL OUT --dry-run --device cpu --json", "plan MODEL --json",
         "convert MODEL OUT --tokens 512 --partition random --recovery none --force --device cpu --json",
         "benchmark tiny --against MODEL --prompt 8 --new 2 --rounds 1 --device cpu --json",
         f"finetune CONVERTED OUT --teacher MODEL {TRAIN}")  # fmt: skip
CONVERTED = ("inspect MODEL --json", "export MODEL OUT --json", "export MODEL OUT --format moesaic --json",
             "export MODEL OUT.gguf --json", f"finetune MODEL OUT {TRAIN}")  # fmt: skip
TEXTS = [
    "nan", "inf", "-0.0", "1e300", str(10**18), "-1", "0", "1", "2", "0.5", "", " ", "[x]", "[/x]", "\ud800", "\0",
    "é" * 300, "~nobody/x", "../..", "x" * 5_000, "{a: [", '{"a": 1}', "no/such/folder/x", "a..b/c", "-x", "auto", "*",
    "a,b", "1,,2", "cmoe:top_k=nan", "random", "S1A1E4", "S0A0E0", "lora", "cpu", "float16", "tiny", "/dev/null",
    "/proc/self/mem", "/", ".", "owner/name", "a b/c d", "x.gguf", "x.png", "WRONG", "FOLDER", "EMPTY", "BINARY",
]  # fmt: skip
"""Values of options; the last four are names of what is there."""
BASES = {
    "adapt": "tiny-moe OUT --method top-p --samples 24 --window 32 --tokens 256",
    "prune": "tiny-moe OUT --experts 12 --tokens 256 --window 32 --recovery none --method frequency",
    "plan": "tiny", "convert": "tiny OUT --dry-run --tokens 512 --partition random --recovery none --force",
    "evaluate": f"tiny {SCORE}", "generate": "tiny hi --max-new-tokens 2",
    "benchmark": "tiny --against tiny --prompt 8 --new 2 --rounds 1", "inspect": "CONVERTED",
    "serve": "tiny-moe --port 0 --dry-run", "describe": "partition:cmoe",
    "export": "CONVERTED OUT", "finetune": f"CONVERTED OUT {TRAIN}", "demo": "--model tiny --out OUT",
    "frontier": "tiny --out OUT --methods static+closed-form --active 50 --tokens 512 --no-speed --items 2",
}  # fmt: skip
SLOW = {"demo", "frontier", "finetune", "adapt", "prune"}


class Hang(BaseException):
    """A verb takes too long."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The undamaged models by name, and what is wrong on purpose."""
    base = tmp_path_factory.mktemp("models")
    shutil.copytree(tiny_folder(), base / "dense")
    moesaic.convert("tiny", base / "stock", ConvertConfig(format="glm4_moe", plan="S1A1E4", **FEW), force=True)
    moesaic.convert("tiny", base / "own", ConvertConfig(format="moesaic", **FEW), force=True)
    (base / "gguf").mkdir()
    write_dense_gguf(tiny_folder(), base / "gguf" / "m.gguf", "f16")
    (base / "wrong.txt").write_text("{")
    (base / "empty").mkdir()
    (base / "binary").write_bytes(bytes(range(256)))
    return base


@pytest.fixture(scope="module")
def run(models):
    """Runs a line in a folder: (exit code, standard output, standard error); what escapes is a fault."""
    before = os.getcwd(), sys.argv, os.environ.get("MOESAIC_CACHE")

    def stop(number, frame):
        raise Hang

    def call(words, folder):
        os.chdir(folder)
        sys.argv = ["moesaic", *words]
        os.environ["MOESAIC_CACHE"] = str(folder / "cache")
        out, err, code = io.StringIO(), io.StringIO(), 0
        signal.alarm(LONGEST_SECONDS)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                cli.main()
        except SystemExit as end:
            code = end.code or 0
        finally:
            signal.alarm(0)
            os.chdir(before[0])
        return code, out.getvalue(), err.getvalue()

    handler = signal.signal(signal.SIGALRM, stop)
    stdin, sys.stdin = sys.stdin, open(os.devnull)  # noqa: SIM115
    yield call
    sys.stdin.close()
    sys.stdin = stdin
    signal.signal(signal.SIGALRM, handler)
    sys.argv = before[1]
    os.environ.pop("MOESAIC_CACHE", None) if before[2] is None else os.environ.update(MOESAIC_CACHE=before[2])


def refuse(constant):
    raise ValueError(f"{constant} in JSON")


def fault(run, words, folder):
    """Run a line; what is wrong with its end, nothing if all is well, and its JSON."""
    try:
        code, out, err = run(words, folder)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        where = error.__traceback__
        while where and where.tb_next:
            where = where.tb_next
        at = f"{Path(where.tb_frame.f_code.co_filename).name}:{where.tb_lineno}" if where else ""
        return f"{type(error).__name__} at {at}: {str(error)[:200]}", {}
    if "Traceback" in err + out:
        return "a traceback is printed", {}
    lines = err.strip().splitlines()
    if code == 143:
        raise KeyboardInterrupt
    if code not in (0, 1, 2):
        return f"exit code {code}", {}
    left = {path.name for path in folder.iterdir()} - {"cache", "model", "OUT.partial", "OUT.training"}
    if code:
        if left := {name for name in left if name.startswith("OUT")}:
            return f"left behind {left} with exit code {code}", {}
        said = [line for line in lines if "error: " in line.lower() or line.startswith("Usage: ")]
        if not said:
            return f"exit code {code} without a word: {err[-300:]!r}", {}
        if not lines[0].startswith("Usage: ") and len([line for line in lines if line.startswith("error: ")]) != 1:
            return f"not one line: {err[-300:]!r}", {}
    if "--json" in words:
        try:
            found = json.loads(out, parse_constant=refuse) if out else {}
        except ValueError as error:
            return f"bad JSON: {error}", {}
        if bool(found) != (code == 0) and "--help" not in words:
            return f"exit code {code} with {out[:80]!r}", {}
        return "", found if isinstance(found, dict) else {}
    return "", {}


def hashes(folder):
    """What every file in a folder is."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[path] = os.readlink(path)
        elif path.is_file():
            mode = path.stat().st_mode
            found[path] = hashlib.sha256(path.read_bytes()).hexdigest() + str(mode)
        else:
            found[path] = "folder"
    return found


def options_of(verb):
    """Options of a verb, as click knows them: (names, whether it takes a value)."""
    command = typer.main.get_command(cli.app).commands[verb]
    found = []
    for parameter in command.params:
        names = [*parameter.opts, *parameter.secondary_opts]
        if names[0].startswith("--"):
            found += [(name, not parameter.is_flag) for name in names]
    return sorted(found)


def tally(seen, faults):
    if TIMES > 1:
        print(f"\ntried {sum(seen.values())}: {seen}", file=sys.__stderr__)
    assert not faults, "\n".join(
        f"{len(faults)} faults:\n" * (number == 0) + text for number, text in enumerate(faults)
    )


def test_random_options(models, run):
    faults, seen = [], {}
    commands = sorted(typer.main.get_command(cli.app).commands)
    assert set(commands) == set(BASES)
    weighted = [verb for verb in commands for _ in range(1 if verb in SLOW else 6)]
    places = {
        "CONVERTED": models / "stock", "WRONG": models / "wrong.txt", "FOLDER": models / "dense",
        "EMPTY": models / "empty", "BINARY": models / "binary",
    }  # fmt: skip
    before = hashes(models)

    @settings(ENGINE, max_examples=100 * TIMES)
    @given(st.data())
    def attack(data):
        verb = data.draw(st.sampled_from(weighted))
        words = BASES[verb].split()
        if data.draw(st.integers(0, 4)) == 0:  # another argument
            words[data.draw(st.integers(0, min(1, len(words) - 1)))] = data.draw(st.sampled_from(TEXTS))
        for _ in range(data.draw(st.integers(1, 3))):
            name, takes = data.draw(st.sampled_from(options_of(verb)))
            words += [name, data.draw(st.sampled_from(TEXTS))] if takes else [name]
        words = [verb, *(str(places.get(word, word)) for word in words)]
        seen[verb] = seen.get(verb, 0) + 1
        with tempfile.TemporaryDirectory() as folder:
            found, _ = fault(run, words, Path(folder))
        note(faults, words, found)

    attack()
    assert hashes(models) == before
    tally(seen, faults)


def note(faults, text, found):
    """Keep a fault, once of each kind."""
    if found and not any(found[:60] in known for known in faults):
        faults.append(f"{text}: {found}")
        if TIMES > 1:
            print(faults[-1], file=sys.__stderr__, flush=True)


def perplexity_of(run, models):
    """The undamaged models' perplexity."""
    found = {}
    for name in ("dense", "stock", "own", "gguf"):
        place = models / name / ("m.gguf" if name == "gguf" else "")
        with tempfile.TemporaryDirectory() as folder:
            wrong, result = fault(run, ["evaluate", str(place), *SCORE.split()], Path(folder))
        assert not wrong
        found[name] = result["perplexity"]
    return found


def test_damaged_models(models, run):
    faults, seen, expected = [], {}, perplexity_of(run, models)
    verbs = {
        "dense": (*ANY, *DENSE),
        "stock": (*ANY, *CONVERTED),
        "own": (*ANY, *CONVERTED),
        "gguf": (*ANY[:2], *DENSE),
    }

    @settings(ENGINE, max_examples=80 * TIMES)
    @given(st.data())
    def attack(data):
        name = data.draw(st.sampled_from(["dense", "stock", "stock", "own", "own", "gguf"]))
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            model = folder / "model"
            shutil.copytree(models / name, model)
            kinds = [damage.content] if name == "gguf" else [*damage.ALL, damage.extra]
            chosen = [data.draw(st.sampled_from(kinds)) for _ in range(data.draw(st.integers(1, 3)))]
            done = [kind(data.draw, model) for kind in chosen]
            for kind in chosen:
                seen[kind.__name__] = seen.get(kind.__name__, 0) + 1
            before = hashes(model)
            line = data.draw(st.sampled_from([ANY[0]] * 3 + list(verbs[name])))
            where = {"MODEL": model / "m.gguf" if name == "gguf" else model, "CONVERTED": models / "stock"}
            words = [str(where.get(word, word)) for word in line.split()]
            found, result = fault(run, words, folder)
            if not found and hashes(model) != before:
                found = "the input was changed"
            tensors = set(chosen) <= set(damage.TENSORS) and "perplexity" in result and words[0] == "evaluate"
            if tensors and not math.isclose(result["perplexity"], expected[name], rel_tol=0.02):
                found = f"silent: {result['perplexity']} in place of {expected[name]}"
            note(faults, f"{name} {done} {line}", found)

    attack()
    tally(seen, faults)

"""What users get from the wheel: installed without extras it converts and generates. `make wheel` builds it first."""

import os
import re
import subprocess
import venv
import zipfile
from email import message_from_string
from importlib.metadata import distributions
from pathlib import Path

import pytest

from moesaic import __version__

pytestmark = pytest.mark.wheel
ROOT = Path(__file__).parent.parent
EXTRAS = ("PIL", "accelerate", "fastapi", "gguf", "matplotlib", "peft", "sentencepiece", "uvicorn")
BIG = ("torch", "nvidia", "cuda")


@pytest.fixture(scope="module")
def wheel():
    [path] = (ROOT / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return message_from_string(archive.read(f"moesaic-{__version__}.dist-info/METADATA").decode())


@pytest.fixture(scope="module")
def binaries(wheel, tmp_path_factory):
    """Programs of a new environment with the wheel in the versions of this one; torch is lent by this one."""
    folder = tmp_path_factory.mktemp("wheel")
    venv.create(folder / "venv", with_pip=True)
    [site] = (folder / "venv" / "lib").glob("python*/site-packages")
    there = {d.metadata["Name"].lower(): d for d in distributions()}
    for name, found in there.items():
        if name.startswith(BIG):
            for top in {file.parts[0] for file in found.files if file.parts[0] not in {"..", "__pycache__"}}:
                if not (site / top).exists():
                    (site / top).symlink_to(found.locate_file(top))
    # as here, so that pip has no reason to touch what is lent
    pins = folder / "constraints.txt"
    pins.write_text("\n".join(f"{name}=={d.version}" for name, d in there.items() if name != "moesaic"))
    pip = [folder / "venv" / "bin" / "python", "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--constraint", pins, wheel], check=True)
    return folder / "venv" / "bin"


@pytest.fixture(scope="module")
def call(binaries, tmp_path_factory):
    """Runs a program of the new environment far from the repository: (exit code, standard output, standard error)."""
    folder = tmp_path_factory.mktemp("user")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def run(program, *arguments):
        done = subprocess.run(
            [binaries / program, *arguments],
            capture_output=True, text=True, check=False, cwd=folder, env=environment | {"HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture(scope="module")
def converted(call):
    code, _, err = call("moesaic", "convert", "tiny", "out", "--tokens", "1024", "--plan", "S1A2E8")
    assert code == 0, err
    return "out"


def test_it_is_small(wheel):
    """Models of 4, 6 and 5 MB come along, half a megabyte of pictures, as much of text; all else is less than one."""
    with zipfile.ZipFile(wheel) as archive:
        sizes = {info.filename: info.compress_size for info in archive.infolist()}
    models = {name: size for name, size in sizes.items() if name.endswith(".safetensors")}
    assert {name.split("/")[-2] for name in models} == {"tiny", "tiny_moe", "tiny_vlm"}
    assert max(models.values()) < 6_000_000
    pictures = sum(size for name, size in sizes.items() if "/data/pictures/" in name)
    text = sum(size for name, size in sizes.items() if name.endswith(".jsonl") and "/pictures/" not in name)
    assert pictures < 500_000
    assert text < 500_000
    assert sum(sizes.values()) - sum(models.values()) - pictures - text < 1_000_000
    assert wheel.stat().st_size < 17_000_000


def test_it_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name.split("/")[0] for name in names} == {"moesaic", f"moesaic-{__version__}.dist-info"}
    there = {f"moesaic/{p.relative_to(ROOT / 'src/moesaic')}" for p in (ROOT / "src/moesaic").rglob("*") if p.is_file()}
    assert {n for n in names if n.startswith("moesaic/")} == {n for n in there if "__pycache__" not in n}


def test_licence_files_are_inside(wheel, metadata):
    files = metadata.get_all("License-File")
    assert {Path(file).name for file in files} == {"LICENSE", "LICENSE-DATA.md", "ATTRIBUTION.md", "GFDL-1.2.txt"}
    with zipfile.ZipFile(wheel) as archive:
        assert all(archive.read(f"moesaic-{__version__}.dist-info/licenses/{file}") for file in files)


def test_every_licence_in_the_expression_is_explained_and_no_other(metadata):
    page = (ROOT / "LICENSE-DATA.md").read_text()
    explained = {name for row in re.findall(r"^\|.*\| (.+) \|$", page, re.MULTILINE) for name in row.split(", ")}
    expression = set(metadata["License-Expression"].split(" AND "))
    assert expression == {name.strip("`") for name in explained if name.startswith("`")}


def test_no_extra_is_there(call):
    code = "import sys; from importlib.util import find_spec; print([n for n in sys.argv[1:] if find_spec(n)])"
    assert call("python", "-c", code, *EXTRAS) == (0, "[]\n", "")


def test_it_is_the_wheel_that_runs(call, binaries):
    _, out, _ = call("python", "-c", "import moesaic; print(moesaic.__file__)")
    assert Path(out).is_relative_to(binaries.parent)


def test_version(call):
    code, out, err = call("moesaic", "--version")
    assert code == 0, err
    assert f"moesaic {__version__}" in out


def test_help(call):
    code, out, _ = call("moesaic", "--help")
    assert code == 0
    assert {"convert", "finetune", "export", "generate", "evaluate", "benchmark"} <= set(out.split())


def test_generate(call, converted):
    code, out, err = call("moesaic", "generate", converted, "The", "--max-new-tokens", "4")
    assert code == 0, err
    assert out.strip()


def test_evaluate(call, converted):
    code, out, err = call("moesaic", "evaluate", converted, "--window", "256", "--max-tokens", "512", "--json")
    assert code == 0, err
    assert '"perplexity"' in out


@pytest.mark.parametrize(
    ("extra", "arguments"),
    [
        ("train", ["finetune", "out", "trained", "--steps", "1"]),
        ("train", ["adapt", "tiny-moe", "adapted"]),
        ("export", ["export", "out", "out.gguf"]),
        ("plots", ["benchmark", "out", "--plot", "roofline.png"]),
    ],
)
def test_a_missing_extra_says_how_to_get_it(call, converted, extra, arguments):
    code, out, err = call("moesaic", *arguments)
    assert code == 2, err
    assert out == ""
    [line] = err.strip().splitlines()
    assert f"install it with: pip install 'moesaic[{extra}]'" in line

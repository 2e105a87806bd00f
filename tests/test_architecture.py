"""Dependencies point one way (design): later stages know earlier ones, never the other way round."""

import ast
from pathlib import Path

import pytest

import moesaic

SOURCE = Path(moesaic.__file__).parent
BASE = {"config", "registry", "errors", "__init__"}
MAY_USE = {
    "models": BASE,
    "calibration": BASE | {"models"},
    "partition": BASE | {"models", "calibration"},
    "routing": BASE | {"models", "calibration", "partition"},
    "recovery": BASE | {"models", "calibration", "partition", "routing"},
    "export": BASE | {"models"},
    "runtime": BASE | {"models"},
    "evaluation": BASE | {"models", "calibration"},
    "training": BASE | {"models", "calibration", "evaluation", "shapes"},
}


def imports(path):
    package = path.relative_to(SOURCE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            target = (*base, *(node.module.split(".") if node.module else []))
            yield target[0] if target else (node.names[0].name if node.module is None else "__init__")


@pytest.mark.parametrize("package", MAY_USE)
def test_packages_use_only_earlier_ones(package):
    for path in (SOURCE / package).glob("*.py"):
        used = {name for name in imports(path) if name != package and name != "__version__"}
        assert used <= MAY_USE[package], f"{path.name} uses {used - MAY_USE[package]}"


def test_files_and_functions_stay_short():
    for path in SOURCE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 300, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name}"


def test_there_is_no_junk_drawer():
    assert not [p for p in SOURCE.rglob("*.py") if p.stem in {"utils", "helpers", "common", "misc"}]

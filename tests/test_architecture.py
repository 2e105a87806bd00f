"""The floors of the house: arrows go down only, no room is overfull, names stay in their place, types are said."""

import ast
import re
from pathlib import Path

import pytest

import moesaic

SOURCE = Path(moesaic.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
FLOORS = [
    "errors", "progress", "files", "given", "machine", "compat", "registry", "plan", "results", "report", "config",
    "checkpoint",
    "models", "calibration", "partition", "routing", "moe", "recovery", "formats", "store", "serving", "evaluation",
    "conversion", "pruning", "training", "adaptation", "comparison", "effort", "demo", "cli",
]  # fmt: skip
"""From the ground up: a file imports from its own floor and from those before it."""
FAMILY_NAMES = re.compile(r"model\.layers|self_attn|\bbase_model\.(layers|norm)\b|\.embed_tokens")
MOST_ANY, MOST_DICTIONARIES = 100, 40


def floor(path):
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(path):
    """(module, line) of each import of the package in a file, also within functions and for type checking only."""
    inside = path.relative_to(SOURCE).with_suffix("").parts
    package = inside[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            for alias in node.names:
                whole = (*base, *(node.module.split(".") if node.module else ()), alias.name)
                yield whole, node.lineno
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "moesaic":
                    yield tuple(alias.name.split(".")[1:]), node.lineno


def module_of(target):
    """The file that an import names: a module, or what is in one."""
    for parts in (target, target[:-1]):
        path = SOURCE.joinpath(*parts)
        if path.with_suffix(".py").is_file():
            return path.with_suffix(".py")
        if (path / "__init__.py").is_file():
            return path / "__init__.py"
    return None


def test_every_file_is_on_a_floor():
    assert {floor(path) for path in FILES} - {"__init__"} == set(FLOORS)


@pytest.mark.parametrize("path", [p for p in FILES if floor(p) != "__init__"], ids=lambda p: str(p.relative_to(SOURCE)))
def test_arrows_go_down(path):
    own = FLOORS.index(floor(path))
    for target, line in imports(path):
        used = module_of(target)
        if used is None or floor(used) == "__init__":  # `from .. import __version__`
            continue
        assert FLOORS.index(floor(used)) <= own, f"{path}:{line} imports from {floor(used)}, which is above it"


def test_nothing_goes_in_circles():
    graph = {path: {module_of(target) for target, _ in imports(path)} - {None, path} for path in FILES}
    # a package's __init__ gathers names of its files, which may name the package for them
    graph = {
        path: {p for p in used if p.name != "__init__.py"} for path, used in graph.items() if path.name != "__init__.py"
    }
    while leaves := [path for path, used in graph.items() if not used & graph.keys()]:
        for leaf in leaves:
            del graph[leaf]
    assert not graph, f"circles among {sorted(str(path.relative_to(SOURCE)) for path in graph)}"


def test_no_room_is_overfull():
    lines = {}
    for path in FILES:
        lines[floor(path)] = lines.get(floor(path), 0) + len(path.read_text().splitlines())
    total = sum(lines.values())
    assert {name: count for name, count in lines.items() if count > 0.15 * total} == {}


def test_files_and_functions_stay_short():
    for path in FILES:
        assert len(path.read_text().splitlines()) <= 300, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name}"


def test_there_is_no_junk_drawer():
    assert not [p for p in FILES if p.stem in {"utils", "helpers", "common", "misc"}]


def test_names_of_families_are_in_one_file():
    found = {p.name: FAMILY_NAMES.findall(p.read_text()) for p in FILES if p != SOURCE / "models" / "families.py"}
    assert {name: names for name, names in found.items() if names} == {}


def test_private_names_of_transformers_are_in_one_file():
    private = re.compile(
        r"\._(experts_implementation|can_set_experts_implementation|model_mapping|tied_weights_keys|init_weights)\b"
    )
    assert [p.name for p in FILES if p.name != "compat.py" and private.search(p.read_text())] == []


def test_types_are_said():
    text = "".join(path.read_text() for path in FILES)
    assert len(re.findall(r"\bAny\b", text)) <= MOST_ANY
    assert len(re.findall(r"dict\[str, Any\]", text)) <= MOST_DICTIONARIES


def test_no_function_returns_an_unnamed_tuple_of_more_than_two():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef) or node.returns is None:
                continue
            for part in ast.walk(node.returns):
                if isinstance(part, ast.Subscript) and ast.unparse(part.value) == "tuple":
                    parts = part.slice.elts if isinstance(part.slice, ast.Tuple) else [part.slice]
                    assert len(parts) <= 2 or node.name.startswith("__"), f"{path.name}: {node.name}"

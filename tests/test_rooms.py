"""Imports between rooms go only downwards, from jobs to the library, never between rooms on the same floor."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = (
    {"jobs"},
    {"experiments", "diagnostics", "benchmark"},
    {"training", "evaluation"},
    {"encoding"},
    {"data"},
    {"runtime"},
    {"litevae"},
)
FILES = [
    path
    for folder in ("jobs", "pipelines", "litevae")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path.name != "__init__.py"
]


def room_of(module: str) -> str:
    """Return the room of `pipelines.ROOM.FILE`, or the package of any other module."""
    package, _, rest = module.partition(".")
    return rest.partition(".")[0] if package == "pipelines" else package


def floor_of(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
    here = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for node in ast.walk(ast.parse(path.read_text())):
        for name in imported_by(node):
            if name.partition(".")[0] in ("litevae", "pipelines"):
                there = room_of(name)
                assert there == here or floor_of(there) > floor_of(here), f"line {node.lineno} imports {name}"


def imported_by(node: ast.AST) -> list[str]:
    """Dotted names that an import names; relative imports, whose room is not to be seen in them, are not allowed."""
    if isinstance(node, ast.Import):
        return [name.name for name in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno} is a relative import"
        return [f"{node.module}.{name.name}" for name in node.names]
    return []


def imports_of(path: Path) -> set[str]:
    """Return the modules of this project that a file imports, also inside functions."""
    modules = {".".join(each.relative_to(ROOT).with_suffix("").parts) for each in FILES}
    named = [name for node in ast.walk(ast.parse(path.read_text())) for name in imported_by(node)]
    return {*named, *(name.rpartition(".")[0] for name in named)} & modules


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("import os, pipelines.training.loop as loop", ["os", "pipelines.training.loop"]),
        ("from pipelines.data import source, folder", ["pipelines.data.source", "pipelines.data.folder"]),
        ("x = 1", []),
    ],
)
def test_all_ways_to_import_are_seen(text, names):
    (node,) = ast.parse(text).body
    assert imported_by(node) == names


def test_relative_imports_are_refused():
    (node,) = ast.parse("from ..data import source").body
    with pytest.raises(AssertionError, match="relative"):
        imported_by(node)


def test_there_are_no_circles():
    graph = {".".join(path.relative_to(ROOT).with_suffix("").parts): imports_of(path) for path in FILES}
    list(TopologicalSorter(graph).static_order())  # raises where files import each other

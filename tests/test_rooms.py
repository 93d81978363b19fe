"""Who may import whom: from jobs down to the library, never up and never between rooms on the same floor."""

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
    """The room of `pipelines.ROOM.FILE`, or the package of any other module."""
    package, _, rest = module.partition(".")
    return rest.partition(".")[0] if package == "pipelines" else package


def floor_of(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
    here = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for node in ast.walk(ast.parse(path.read_text())):
        if (
            isinstance(node, ast.ImportFrom)
            and node.module
            and node.module.partition(".")[0] in ("litevae", "pipelines")
        ):
            names = [f"{node.module}.{name.name}" for name in node.names]
            for name in names:
                there = room_of(name)
                assert there == here or floor_of(there) > floor_of(here), f"line {node.lineno} imports {name}"


def imports_of(path: Path) -> set[str]:
    """Modules of ours that a file imports, in functions, too."""
    modules = {".".join(each.relative_to(ROOT).with_suffix("").parts) for each in FILES}
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom) and node.module]
    named = {f"{node.module}.{name.name}" for node in nodes for name in node.names}
    return (named | {node.module for node in nodes if node.module}) & modules


def test_there_are_no_circles():
    graph = {".".join(path.relative_to(ROOT).with_suffix("").parts): imports_of(path) for path in FILES}
    list(TopologicalSorter(graph).static_order())  # raises where files import each other

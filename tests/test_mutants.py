"""The list of faults fits the code: where they are tried (`make mutants`) is a command, since it takes minutes."""

import ast

import pytest

from tests.mutants import MUTANTS
from tests.mutate import REPO, mutated, place


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_each_fault_has_one_place_is_python_and_names_tests_that_are_there(mutant):
    path = place(mutant)
    assert mutated(mutant, path) != path.read_text()
    assert mutant.tests
    for test in mutant.tests:
        file, *names = test.split("::")
        tree = ast.parse((REPO / file).read_text())
        assert {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)} >= {*names}, test


def test_no_fault_is_listed_twice():
    assert len({mutant[:3] for mutant in MUTANTS}) == len(MUTANTS)

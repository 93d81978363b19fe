"""Small faults that the fast tests have to notice: `make mutants` puts them into the code, one at a time."""

from typing import NamedTuple


class Mutant(NamedTuple):
    """Where `old`, which the product holds once, is replaced by `new`, each of `tests` has to fail (of a test with
    several cases one case). `file` is where it stood last: it is found by its text."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def __str__(self) -> str:
        old, new = (" ".join(text.split()) for text in (self.old, self.new))
        return f"{self.file}: {old}  ->  {new}"


MUTANTS = [
    Mutant(
        "pipelines/training.py",
        "return (images + 1) / (config.warmup + 1)",
        "return 1.0",
        ("tests/pipelines/test_training.py::test_the_rate_warms_up_and_falls",),
    ),
    Mutant(
        "pipelines/training.py",
        "return every > 0 and before // every != after // every",
        "return before // every != after // every if every else True",
        ("tests/pipelines/test_training.py::test_due_where_a_multiple_was_passed",),
    ),
]

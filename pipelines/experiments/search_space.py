"""The search space of a sweep: for each field, a list of values or a distribution to draw from."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from litevae.errors import UserError
from pipelines.experiments.config import Sweep

DRAWS = ("uniform", "loguniform", "randint", "choice")


def space_fields(space: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted field name, list of values or {kind of draw: arguments}) for each field of a nested space.

    Raises:
        UserError: if a field has neither a list of values nor a valid distribution.
    """
    for key, value in space.items():
        name = f"{prefix}{key}"
        if isinstance(value, list) and value:
            yield name, value
        elif isinstance(value, dict) and len(value) == 1 and (draw := next(iter(value))) in DRAWS:
            arguments = value[draw]
            if draw == "choice" and not (isinstance(arguments, list) and arguments):
                raise UserError(f"space.{name}: choice takes a list of values, not {arguments}")
            numbers = isinstance(arguments, list) and all(isinstance(item, int | float) for item in arguments)
            if draw != "choice" and not (numbers and len(arguments) == 2 and arguments[0] < arguments[1]):
                raise UserError(f"space.{name}: {draw} takes [smallest, largest], not {arguments}")
            if draw == "loguniform" and arguments[0] <= 0:
                raise UserError(f"space.{name}: loguniform takes numbers above 0, not {arguments}")
            yield name, {draw: arguments}
        elif isinstance(value, dict) and value:
            yield from space_fields(value, f"{name}.")
        else:
            kinds = ", ".join(f"{{{draw}: [a, b]}}" for draw in DRAWS)
            raise UserError(f"space.{name}={value!r} is neither a list of values nor one of {kinds}")


def nested(values: dict[str, Any]) -> dict[str, Any]:
    """Turn {dotted name: value} into nested sections."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        *parents, last = key.split(".")
        section = found
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    return found


def drawn_value(values: Any, generator: np.random.Generator) -> Any:
    """Draw one value of a field.

    Args:
        values: a list of values, or {kind of draw: arguments}; for randint both ends are included.
        generator: the random generator.
    """
    kind, arguments = ("choice", values) if isinstance(values, list) else next(iter(values.items()))
    if kind == "choice":
        return arguments[generator.integers(len(arguments))]
    if kind == "randint":
        return int(generator.integers(arguments[0], arguments[1] + 1))
    low, high = np.log(arguments) if kind == "loguniform" else arguments
    value = generator.uniform(low, high)
    return float(np.exp(value) if kind == "loguniform" else value)


def tune_space(cfg: Sweep) -> dict[str, Any]:
    """Return the search space for Ray Tune: the first seed, and the domain of each field."""
    return {"seed": cfg.seeds[0]} | {key: domain(values) for key, values in space_fields(cfg.space)}


def domain(values: Any) -> Any:
    """Return the domain from which Tune and Optuna draw a field's values."""
    from ray import tune

    kind, arguments = ("choice", values) if isinstance(values, list) else next(iter(values.items()))
    if kind == "choice":
        return tune.choice(arguments)
    if kind == "randint":
        return tune.randint(arguments[0], arguments[1] + 1)
    return getattr(tune, kind)(*arguments)


def within(config: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Clip a config's drawn values to their ranges, in place, and return the config.

    Args:
        config: values by dotted field name.
        fields: the search space, as `space_fields` yields it.
    """
    for key, values in fields.items():
        kind, arguments = ("choice", values) if isinstance(values, list) else next(iter(values.items()))
        if kind != "choice":
            value = min(max(config[key], arguments[0]), arguments[1])
            config[key] = round(value) if kind == "randint" else value
    return config

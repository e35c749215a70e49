"""Checks of fields that configurations share; the error names the field."""

import math


def at_least(config, low: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not (low <= value < math.inf):
            raise ValueError(f"{name}: expected a finite number of at least {low}, got {value}")


def one_of(config, choices: tuple[str, ...], name: str) -> None:
    value = getattr(config, name)
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def only_where(config, name: str, takes: bool, given: str, where: str) -> None:
    """ValueError: a field that is set beside a setting that does not take it."""
    got = getattr(config, name)
    if got is not None and not takes:
        raise ValueError(f"{name}: expected None with {given} (for {where}), got {got!r}")

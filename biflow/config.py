"""Dataclasses from plain mappings (YAML, checkpoint metadata, `key=value` overrides), checked field by field."""

import dataclasses
import functools
import math
import numbers
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")
OVERFLOWS, VANISHES = 2.0**128 - 2.0**103, 2.0**-150  # as fp32: infinite from the one on, 0 up to the other


def from_mapping(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Build the dataclass `cls` from `values`; nested dataclasses from nested mappings.

    Args:
        cls: a dataclass whose fields are annotated with int, float, bool, str, tuple[...], dict, None, Any,
            dataclasses, or unions of these.
        values: field name -> value. Missing fields take their default. Lists become tuples; an int is a valid float.
        where: name of the mapping in error messages.

    Raises:
        ValueError: an unknown field, or a value that the dataclass itself refuses.
        TypeError: a value of the wrong type. Both name the field, what was expected and what came.
    """
    where = where or cls.__name__
    if not isinstance(values, Mapping):
        raise TypeError(f"{where}: expected a mapping of fields, got {type(values).__name__} {values!r}")
    hints = _hints(cls)
    fields = {f.name for f in dataclasses.fields(cls) if f.init}
    unknown = [name for name in values if name not in fields]
    if unknown:
        raise ValueError(f"{where}: unknown field {unknown[0]!r}; expected one of {', '.join(sorted(fields))}")
    required = {
        f.name
        for f in dataclasses.fields(cls)
        if f.init and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    missing = sorted(required - set(values))
    if missing:
        raise ValueError(f"{where}: missing field {missing[0]!r}")
    converted = {name: _convert(hints[name], value, f"{where}.{name}") for name, value in values.items()}
    try:
        return cls(**converted)
    except (TypeError, ValueError) as error:  # the dataclass's own checks: say where in the file it sits
        raise (TypeError if isinstance(error, TypeError) else ValueError)(f"{where}: {error}") from error


def check_fields(config: Any) -> None:
    """Convert and check every field of a dataclass instance in place, as `from_mapping` does; for `__post_init__`.

    Lists become tuples, ints in float fields become floats. TypeError or ValueError name the field.
    """
    hints = _hints(type(config))
    for field in dataclasses.fields(config):
        value = _convert(hints[field.name], getattr(config, field.name), field.name)
        object.__setattr__(config, field.name, value)  # the dataclass may be frozen


def check_number(
    name: str, value: Any, *, minimum: float = -math.inf, above: float = -math.inf, single: bool = False
) -> float:
    """`value` as a float: a finite real number (no bool), at least `minimum`, more than `above`.

    single: it will be used as fp32, and must be finite there and, where it has to be above 0, not 0.

    Raises:
        TypeError: not a number. ValueError: NaN, infinite or out of range.
    """
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__} {value!r}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    good = math.isfinite(number) and number >= minimum and number > above
    if not good or (single and (abs(number) >= OVERFLOWS or (above == 0 and number <= VANISHES))):
        bound = f" >= {minimum:g}" if minimum > -math.inf else f" > {above:g}" if above > -math.inf else ""
        raise ValueError(f"{name}: expected a finite number{bound}{' as float32' if good else ''}, got {number:g}")
    return number


def to_mapping(config: Any) -> dict[str, Any]:
    """The inverse of `from_mapping`: nested dicts of plain values (tuples become lists)."""

    def plain(value):
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        if isinstance(value, tuple | list):
            return [plain(v) for v in value]
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return value

    return plain(config)


def completed(cls: type, values: Mapping[str, Any]) -> Mapping[str, Any]:
    """`values` of an older version with the defaults of the fields that it lacks; unchanged if `cls` refuses them."""
    try:
        return to_mapping(from_mapping(cls, values))
    except (TypeError, ValueError):
        return values


def apply_overrides(values: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """`["model.width=256", "optim.lr=1e-3"]` merged into nested `values` (a new dict). Values are read as YAML.

    Raises:
        ValueError: an override without "=", or a path that goes through a value that is not a mapping.
    """
    import yaml

    def copy(value):
        return {k: copy(v) for k, v in value.items()} if isinstance(value, Mapping) else value

    result = copy(values)
    for override in overrides:
        path, separator, text = override.partition("=")
        if not separator or not path:
            raise ValueError(f"override: expected key=value, got {override!r}")
        *parents, leaf = path.split(".")
        if not all([*parents, leaf]):
            raise ValueError(f"override {override!r}: expected names separated by single dots, got {path!r}")
        node = result
        for name in parents:
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise ValueError(f"override {override!r}: {name!r} holds a value, not a group of settings")
        try:
            node[leaf] = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist
            raise ValueError(f"override {override!r}: the value is not valid YAML ({error})") from None
        except RecursionError:
            raise ValueError(f"override {path}: expected a value of fewer nested levels") from None
    return result


_hints = functools.cache(typing.get_type_hints)  # slow, and a decode checks its options each time


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        groups = [option for option in options if dataclasses.is_dataclass(option)]
        if len(groups) == 1 and isinstance(value, Mapping):
            return _convert(groups[0], value, where)  # its own error names the field inside
        for option in options:
            try:
                return _convert(option, value, where)
            except (TypeError, ValueError):
                continue
        raise TypeError(f"{where}: expected {_name(hint)}, got {type(value).__name__} {value!r}")
    if hint is Any:
        return value
    if hint is type(None):
        if value is None:
            return None
    elif dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_mapping(hint, value, where)
    elif origin is tuple:
        items = typing.get_args(hint)
        if isinstance(value, list | tuple):
            if len(items) == 2 and items[1] is Ellipsis:
                return tuple(_convert(items[0], v, f"{where}[{i}]") for i, v in enumerate(value))
            if len(items) == len(value):
                return tuple(_convert(h, v, f"{where}[{i}]") for i, (h, v) in enumerate(zip(items, value, strict=True)))
    elif hint is float:
        # YAML 1.1 reads 1e-3 as a string
        if isinstance(value, numbers.Real | str) and not isinstance(value, bool):
            try:
                return float(value)
            except (ValueError, OverflowError):
                pass
    elif hint is int:
        if isinstance(value, numbers.Integral) and not isinstance(value, bool):
            return int(value)
    elif dict in (hint, origin):
        if isinstance(value, Mapping):
            return dict(value)
    elif isinstance(value, hint):
        return value
    raise TypeError(f"{where}: expected {_name(hint)}, got {type(value).__name__} {value!r}")


def _name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")

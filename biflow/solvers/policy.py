"""Which solver inverts which block: what calibration measured, or the fixed table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from biflow.config import check_fields, check_number, from_mapping, to_mapping
from biflow.solvers.protocol import SOLVERS, TOL, TOL_FLOORS, Condition, effective_tol


@dataclass(frozen=True)
class Method:
    """How a block is inverted. window: tokens a window, at least 1, with "windowed"; None with the others."""

    solver: str
    window: int | None = None

    def __post_init__(self):
        if self.solver not in SOLVERS or self.solver == "auto":
            expected = ", ".join(s for s in SOLVERS if s != "auto")
            raise ValueError(f"solver: expected one of {expected}, got {self.solver!r}")
        if self.solver != "windowed":
            if self.window is not None:
                raise ValueError(
                    f"window: expected None with solver={self.solver!r}, which uses no windows; got {self.window!r}"
                )
        elif not isinstance(self.window, int) or isinstance(self.window, bool):
            raise TypeError(f"window: expected an int, got {type(self.window).__name__} {self.window!r}")
        elif self.window < 1:
            raise ValueError(f"window: expected at least 1 token, got {self.window}")


@dataclass(frozen=True)
class Measurement(Method):
    """The fastest method of a block. passes: network evaluations (`DecodeInfo.passes`); ms: median time a batch."""

    passes: int = 0
    ms: float = 0.0

    def __post_init__(self):
        check_fields(self)
        super().__post_init__()
        if self.passes < 0:
            raise ValueError(f"passes: expected 0 or more, got {self.passes}")
        check_number("ms", self.ms, minimum=0)


@dataclass(frozen=True)
class Entry:
    """What was measured in one situation.

    device, name: type ("cpu") and name of the device; threads: of torch, at the time.
    precision, batch, guidance: of the decode; guidance 0 means none.
    blocks: the fastest method of each block in encode order.
    tol: that the iterative methods met; files that do not say have the default of decode.
    """

    device: str
    name: str
    threads: int
    precision: str
    batch: int
    guidance: float
    blocks: tuple[Measurement, ...]
    tol: float = TOL

    def __post_init__(self):
        check_fields(self)
        if not self.device:
            raise ValueError("device: expected a device type such as 'cpu', got ''")
        if self.precision not in TOL_FLOORS:
            raise ValueError(f"precision: expected one of {', '.join(TOL_FLOORS)}, got {self.precision!r}")
        for name in ("threads", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        check_number("guidance", self.guidance, minimum=0)
        check_number("tol", self.tol, above=0, single=True)
        if not self.blocks:
            raise ValueError("blocks: expected a method for each block, got none")

    @property
    def situation(self) -> tuple[str, str, int, str, int, float]:
        """What entries are told apart by; the newest measurement of a situation replaces the one before."""
        return self.device, self.name, self.threads, self.precision, self.batch, self.guidance

    def within(self, tol: float) -> tuple[Method, ...]:
        """The methods for a decode to `tol`: iterative ones need not meet a tighter one than they were measured with.

        Where they would have to, their passes are not known, and may end in a fallback: those blocks are sequential.
        """
        if effective_tol(tol, self.precision) >= effective_tol(self.tol, self.precision):
            return self.blocks
        return (Method("sequential"),) * len(self.blocks)


@dataclass(frozen=True)
class Policy:
    """The methods that calibration found fastest on a model. About speed only: results stay within the tolerance."""

    entries: tuple[Entry, ...]

    def __post_init__(self):
        check_fields(self)
        seen = set()
        for entry in self.entries:
            if entry.situation in seen:
                raise ValueError(f"entries: expected one for each situation, got two for {entry.situation}")
            if len(entry.blocks) != len(self.entries[0].blocks):
                raise ValueError(
                    f"entries: expected {len(self.entries[0].blocks)} blocks in each, as in the first, "
                    f"got {len(entry.blocks)}"
                )
            seen.add(entry.situation)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], num_blocks: int, where: str = "policy") -> Policy:
        """A policy from JSON values (`to_mapping`) for a model of `num_blocks`. ValueError names what is wrong."""
        try:
            return from_mapping(cls, values, where).fitting(num_blocks)
        except TypeError as error:
            raise ValueError(str(error)) from None

    def to_mapping(self) -> dict[str, Any]:
        """JSON values."""
        return to_mapping(self)

    def fitting(self, num_blocks: int) -> Policy:
        """Itself; ValueError unless it is one for a model of `num_blocks`."""
        if self.entries and len(self.entries[0].blocks) != num_blocks:
            raise ValueError(
                f"policy: expected methods of {num_blocks} blocks, as the model has, got {len(self.entries[0].blocks)}"
            )
        return self

    def replacing(self, entries: tuple[Entry, ...]) -> Policy:
        """This policy with newer entries, which take the place of those of the same situation."""
        newer = {entry.situation for entry in entries}
        kept = tuple(entry for entry in self.entries if entry.situation not in newer)
        return Policy(tuple(sorted((*kept, *entries), key=lambda entry: entry.situation)))

    def choose(
        self, device: str, precision: str, batch: int, guidance: float, *, name: str = "", threads: int = 0
    ) -> Entry | None:
        """The entry measured in the most similar situation; None without one of this device type and precision.

        First of the device of that name, then of as many threads, then with guidance for guided decodes and without for
        others, of the nearest batch by |log2 ratio|, the smaller of two, of the nearest guidance, the smaller of two,
        and last of the nearest number of threads, likewise. What remains equal follows the entries' order.
        """

        def apart(a: int, b: int) -> float:
            return max(a, b, 1) / max(min(a, b), 1)

        def distance(entry: Entry) -> tuple:
            return (
                entry.name != name,
                entry.threads != threads,
                (entry.guidance > 0) != (guidance > 0),
                apart(entry.batch, batch), entry.batch,
                abs(entry.guidance - guidance), entry.guidance,
                apart(entry.threads, threads), entry.threads,
            )  # fmt: skip

        able = [entry for entry in self.entries if (entry.device, entry.precision) == (device, precision)]
        return min(able, key=distance, default=None)


def methods(
    asked: Method | None,
    policy: Policy | None,
    num_blocks: int,
    device: str,
    batch: int,
    condition: Condition,
    tol: float,
    *,
    name: Callable[[], str] = str,
    threads: int = 0,
) -> tuple[Method, ...]:
    """The method of each block, in encode order: the one `asked` for, or (None) that of the policy.

    Without a policy, or without an entry in it for this device and precision, every block is decoded sequentially:
    the one solver that ignores tol and whose time does not depend on the values. So it is where tol is tighter than the
    entry's. name, threads: of the device that decodes; entries that were measured with them are preferred.
    """
    if asked is not None:
        return (asked,) * num_blocks
    if policy is not None and not isinstance(policy, Policy):
        raise TypeError(f"policy: expected a solvers.Policy or None, got {type(policy).__name__}")
    entry = None
    if policy is not None:
        entry = policy.fitting(num_blocks).choose(
            device, condition.precision, batch, condition.guidance.scale, name=name(), threads=threads
        )
    return (Method("sequential"),) * num_blocks if entry is None else entry.within(tol)

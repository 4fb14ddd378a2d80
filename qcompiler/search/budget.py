"""What a search must keep within, as typed and as numbers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from qcompiler.errors import QCompilerError
from qcompiler.report import byte_count, quantity
from qcompiler.target import BYTE_UNITS, parse_unit

Figure = Literal["noise", "latency", "energy", "weights"]
"""What a choice of formats is judged by."""
Goal = Literal["latency", "energy", "weights"]
GOALS: tuple[Goal, ...] = ("latency", "energy", "weights")
Figures = Mapping[Figure, float]

DEFAULT_DROP = 0.01
"""Lost where no budget is given, or only what to minimise."""

TIME_UNITS: Mapping[str, float] = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}
JOULE_UNITS: Mapping[str, float] = {"nJ": 1e-9, "uJ": 1e-6, "µJ": 1e-6, "mJ": 1e-3, "J": 1.0}


@dataclass(frozen=True)
class Budget:
    """Limits, and what to minimise within them. Without any, `DEFAULT_DROP` is the limit."""

    max_drop: float | None = None
    """Loss of accuracy as a share: 0.01 is one point of top-1, or outputs whose error has 1% of their power."""
    max_latency: float | None = None
    """Seconds."""
    max_energy: float | None = None
    """Joules per inference."""
    max_weights: float | None = None
    """Bytes."""
    minimise: Goal | None = None
    """With a limit on the loss of accuracy; None: all three, each as a share of its range."""

    @property
    def limits(self) -> dict[Figure, float]:
        """Of the costs, where there are any."""
        given: dict[Figure, float | None] = {
            "latency": self.max_latency, "energy": self.max_energy, "weights": self.max_weights,
        }  # fmt: skip
        return {goal: limit for goal, limit in given.items() if limit is not None}

    @property
    def drop(self) -> float | None:
        """The limit on the loss of accuracy; None where costs alone are limited and accuracy is to be the best."""
        if self.max_drop is None and (self.minimise is not None or not self.limits):
            return DEFAULT_DROP
        return self.max_drop

    @property
    def is_empty(self) -> bool:
        return self == Budget()

    def __str__(self) -> str:
        parts = [f"a loss of at most {self.drop:.2%}"] if self.drop is not None else []
        parts += [f"{goal} at most {shown(goal, limit)}" for goal, limit in self.limits.items()]
        parts += [f"least {self.minimise}"] if self.minimise is not None else []
        return ", ".join(parts)


def shown(goal: Figure, value: float) -> str:
    """A cost for people to read."""
    if goal == "weights":
        return byte_count(round(value))
    return quantity(value, "s" if goal == "latency" else "J")


def parse_budget(
    max_drop: str | None,
    max_latency: str | None,
    max_energy: str | None,
    max_weights: str | None,
    minimise: Goal | None,
) -> Budget:
    """Read options as typed: "1%", "3ms", "5uJ", "250KiB". Raises QCompilerError naming the option."""
    return Budget(
        _share(max_drop) if max_drop is not None else None,
        _measure("--max-latency", max_latency, TIME_UNITS),
        _measure("--max-energy", max_energy, JOULE_UNITS),
        _measure("--max-weights", max_weights, BYTE_UNITS),
        minimise,
    )


def _measure(option: str, text: str | None, units: Mapping[str, float]) -> float | None:
    if text is None:
        return None
    try:
        value = parse_unit(text, units)
    except ValueError as error:
        raise QCompilerError(f"{option} {error}.") from None
    if value <= 0:
        raise QCompilerError(f"{option} {text}: it must be more than nothing.")
    return value


def _share(text: str) -> float:
    try:
        value = float(text.removesuffix("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise QCompilerError(f"--max-drop {text}: write a share such as 1% or 0.01.")
    return value

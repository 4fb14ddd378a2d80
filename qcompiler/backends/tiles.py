"""Which tile a template computes at a time: what there is to choose from, and who chooses.

A template lists the tiles that fit the registers, the likely best first; a `TileChoice` takes one. `best_guess` takes
the first; `qcompiler.tile_database` knows what `qcompile tune` has measured.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class ConvTile:
    """Accumulators held in registers: `pixels` neighbours in a row times `blocks` vectors of output channels."""

    pixels: int
    blocks: int


@dataclass(frozen=True)
class Tiling:
    """A choice to be made."""

    workload: str
    """The template and all that its speed depends on but the CPU: shapes, types, threads. Equal for equal code."""
    candidates: tuple[ConvTile, ...]
    """The likely best first."""


TileChoice = Callable[[Tiling], ConvTile]


def best_guess(tiling: Tiling) -> ConvTile:
    return tiling.candidates[0]

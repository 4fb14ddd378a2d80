"""Decide which operator runs where, and cut the integer graph into regions."""

from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

Backend = Literal["cpu", "npu"]


@dataclass(frozen=True)
class Placement:
    """Where one operator runs and why."""

    node: str
    op: str
    """The ONNX name a rule knows it by."""
    backend: Backend
    engine: str
    precision: str
    reason: str | None
    """Why the accelerator does not run it; None where it does, or where there is none."""


@dataclass(frozen=True)
class Region:
    """Operators one backend runs without a break."""

    name: str
    backend: Backend
    nodes: tuple[ir.Node, ...]
    """In execution order."""
    inputs: tuple[ir.Value, ...]
    """Values from outside that are not constants."""
    outputs: tuple[ir.Value, ...]
    """Values read outside, graph outputs included."""


@dataclass(frozen=True)
class Partition:
    regions: tuple[Region, ...]
    """In execution order; no cycles between them."""
    placements: tuple[Placement, ...]
    """One per node, in graph order."""

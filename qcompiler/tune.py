"""`qcompile tune`: measure the tiles of every layer the CPU runs, and remember the best.

Each distinct workload of the model is compiled with its likeliest tiles, in the templates' order, and run on random
numbers by itself. The best is what takes least time in its quickest run; runs of all candidates take turns, so that a
disturbance hits all of them. A tile must beat the guess by `MARGIN`.
"""

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tvm

from qcompiler import tile_database
from qcompiler.backends.base import HostCode, Kernel, host_code
from qcompiler.backends.cpu_region import lower_region
from qcompiler.backends.relax import PASS_CONFIG
from qcompiler.backends.tiles import ConvTile, Tiling
from qcompiler.compile import DEFAULTS, SILENT, Placed, Progress, foreign, place
from qcompiler.errors import QCompilerError
from qcompiler.options import Options
from qcompiler.runtime import start_threads
from qcompiler.tile_database import Measured

CANDIDATES = 8
"""Tiles measured of each workload."""
MARGIN = 0.03
"""Share of the guess's time that another tile must save."""
ROUNDS, ROUND_SECONDS = 6, 0.004
"""Turns of each candidate, and how long one takes at least."""


@dataclass(frozen=True)
class Tuned:
    """What was found out."""

    database: Path
    workloads: int
    """Of the model, distinct ones."""
    measured: int
    """Of them, those the database did not know."""
    changed: int
    """Of those, the ones where another tile than the guess is best."""
    guessed_seconds: float
    """All workloads once, with the tiles a guess takes."""
    seconds: float
    """The same with the best ones."""

    def summary(self) -> str:
        """One paragraph for people."""
        if not self.workloads:
            return "No CPU kernel of this model has tiles to choose from."
        known = self.workloads - self.measured
        return (
            f"{self.workloads} distinct kernels, {known} known before. Of the {self.measured} measured, another tile "
            f"is best for {self.changed}. All together, once each: {self.guessed_seconds * 1e3:.3f} ms before, "
            f"{self.seconds * 1e3:.3f} ms tuned. `qcompile compile` will use {self.database}."
        )


def tune(
    model: str | os.PathLike[str],
    target: str | os.PathLike[str],
    options: Options = DEFAULTS,
    *,
    database: Path | None = None,
    again: bool = False,
    candidates: int = CANDIDATES,
    progress: Progress = SILENT,
) -> Tuned:
    """Measure what the database does not know yet.

    Args:
        database: the file; by default that of the user's cache, `tile_database.default_path`.
        again: measure all workloads, known or not.
        candidates: tiles to measure of each workload.
        Others: as in `compile.compile`.

    Raises:
        QCompilerError: anything wrong with what was given, or the target's CPU is not this machine's.
    """
    path = tile_database.default_path() if database is None else database
    placed = place(model, target, options, progress)
    if (reason := foreign(placed.target)) is not None:
        raise QCompilerError(
            f"tiles can be measured on the CPU they are for only, and {placed.target.name} is another: {reason}."
        )
    host = host_code(placed.target.host)
    known = tile_database.load(path, host)
    progress.stage("tune")
    first = _kernels(placed, host, 0)
    wanted = {name: kernel for name, kernel in first.items() if again or not known.knows(_tiling(kernel))}
    variants = [_kernels(placed, host, rank) for rank in range(candidates)] if wanted else []
    found: dict[str, Measured] = {}
    start_threads(host.threads)
    for done, name in enumerate(wanted):
        progress.advance(done, len(wanted))
        tried = _tiling(wanted[name]).candidates[:candidates]
        found[name] = _best(tried, [kernels[name] for kernels in variants[: len(tried)]], host)
        # Whoever interrupts keeps what was found.
        tile_database.save(path, known.with_measured(found))
    complete = known.with_measured(found).measured
    return Tuned(
        path,
        len(first),
        len(found),
        sum(item.tile != _tiling(wanted[name]).candidates[0] for name, item in found.items()),
        sum(complete[name].guessed_seconds for name in first),
        sum(complete[name].seconds for name in first),
    )


def _kernels(placed: Placed, host: HostCode, rank: int) -> dict[str, Kernel]:
    """By workload, the first kernel of the CPU's regions that has it, with its candidate of that rank (or the last)."""

    def choose(tiling: Tiling) -> ConvTile:
        return tiling.candidates[min(rank, len(tiling.candidates) - 1)]

    kernels: dict[str, Kernel] = {}
    for region in placed.partition.regions:
        if region.backend == "cpu":
            for step in lower_region(region.nodes, replace(host, tiles=choose)):
                if isinstance(step.lowering, Kernel) and step.lowering.tiling is not None:
                    kernels.setdefault(step.lowering.tiling.workload, step.lowering)
    return kernels


def _tiling(kernel: Kernel) -> Tiling:
    assert kernel.tiling is not None
    return kernel.tiling


# --- measuring ---------------------------------------------------------------------------------------------


def _best(tiles: Sequence[ConvTile], kernels: Sequence[Kernel], host: HostCode) -> Measured:
    """The best of some tiles; the first is the guess."""
    functions = {
        f"f{rank}": kernel.function.with_attr("global_symbol", f"f{rank}") for rank, kernel in enumerate(kernels)
    }
    with tvm.transform.PassContext(config=PASS_CONFIG):
        built: Any = tvm.compile(tvm.IRModule(functions), target=host.target)
    runs = [_run(built[f"f{rank}"], kernel) for rank, kernel in enumerate(kernels)]
    quickest = [math.inf] * len(runs)
    for _ in range(ROUNDS):
        for rank, run in enumerate(runs):
            quickest[rank] = min(quickest[rank], *_timed(run))
    best = min(range(len(runs)), key=quickest.__getitem__)
    if quickest[best] > (1 - MARGIN) * quickest[0]:
        best = 0
    return Measured(tiles[best].pixels, tiles[best].blocks, quickest[best], quickest[0])


def _run(function: Any, kernel: Kernel) -> Callable[[], None]:
    """A call on random numbers."""
    rng = np.random.default_rng(0)
    buffers: Any = kernel.function
    shapes = [(tuple(int(dim) for dim in buffer.shape), str(buffer.dtype)) for buffer in buffers.params]
    given = len(kernel.inputs)
    arrays = [_random(rng, *shape) for shape in shapes[:given]]
    arrays += list(kernel.parameters)
    arrays += [np.zeros(shape, dtype) for shape, dtype in shapes[given + len(kernel.parameters) :]]
    tensors = [tvm.runtime.tensor(np.ascontiguousarray(array).reshape(array.shape)) for array in arrays]
    return lambda: function(*tensors)


def _random(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    if dtype.startswith("float"):
        return rng.standard_normal(shape).astype(dtype)
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max + 1, shape).astype(dtype)


def _timed(run: Callable[[], None]) -> Iterator[float]:
    """Seconds of each of some runs."""
    end = time.perf_counter() + ROUND_SECONDS
    while True:
        started = time.perf_counter()
        run()
        finished = time.perf_counter()
        yield finished - started
        if finished > end:
            return

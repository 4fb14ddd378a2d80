"""What a driver does, step by step, and how that is emitted: the same loops for words and for TIR."""

from collections.abc import Sequence
from dataclasses import dataclass

from qcompiler.backends.npu_cascade_loops import Cascade, emit_cascade, emit_first_constants
from qcompiler.backends.npu_emit import Emitter
from qcompiler.backends.npu_loops import Fill, TiledWork, Transfer, emit_fill, emit_streams, emit_transfer, emit_work
from qcompiler.simulator import isa


@dataclass(frozen=True)
class Step:
    """One node: what to emit for it. A node whose output is only a view has nothing."""

    node: str
    op: str
    work: TiledWork | None
    """None for what a cascade computes."""
    fills: tuple[Fill | Transfer, ...]
    """What comes before the copies, which write over parts of it."""
    copies: tuple[Transfer, ...]
    exports: tuple[Transfer, ...]
    """Region outputs to copy out once this node, or the cascade it is in, is done."""
    allocs: tuple[tuple[int, int], ...]
    """Scratchpad reservations that begin here: offset, bytes."""
    frees: tuple[tuple[int, int], ...]
    prefetch: int | None
    """The step whose first constants are fetched beside this one's last tile."""
    prefetched: bool


def emit_program(emit: Emitter, steps: Sequence[Step], cascades: Sequence[Cascade]) -> None:
    """Everything a driver does between opening and closing its region."""
    _Program(emit, steps, cascades).run()


class _Program:
    def __init__(self, emit: Emitter, steps: Sequence[Step], cascades: Sequence[Cascade]) -> None:
        self.emit, self.steps = emit, steps
        self.cascades = {cascade.steps[0]: cascade for cascade in cascades}

    def run(self) -> None:
        index = 0
        while index < len(self.steps):
            cascade = self.cascades.get(index)
            unit = cascade.steps if cascade is not None else range(index, index + 1)
            self.emit.call(isa.LAYER, index)
            for step in unit:
                for span in self.steps[step].allocs:
                    self.emit.call(isa.ALLOC, *span)
            if cascade is not None:
                first, last = self.steps[unit[0]], unit[-1]
                emit_cascade(
                    self.emit, cascade, prefetched=first.prefetched, meanwhile=lambda last=last: self._fetch(last)
                )
            for step in unit:
                if cascade is not None and self.steps[step].exports:
                    self.emit.call(isa.LAYER, step)
                self._emit_step(step)
            for step in unit:
                for span in self.steps[step].frees:
                    self.emit.call(isa.FREE, *span)
            index = unit[-1] + 1

    def _emit_step(self, index: int) -> None:
        step = self.steps[index]
        if step.work is not None:
            emit_work(self.emit, step.work, prefetched=step.prefetched, meanwhile=lambda: self._fetch(index))
        for moves in (step.fills, step.copies, step.exports):
            for move in moves:
                if isinstance(move, Fill):
                    emit_fill(self.emit, move)
                else:
                    emit_transfer(self.emit, move)
            if moves:
                self.emit.call(isa.BARRIER)

    def _fetch(self, index: int) -> None:
        """Fetch the first constants of what follows. The traffic counts as that layer's."""
        following = self.steps[index].prefetch
        if following is None:
            return
        self.emit.call(isa.LAYER, following)
        if following in self.cascades:
            emit_first_constants(self.emit, self.cascades[following])
        else:
            work = self.steps[following].work
            assert work is not None, "only works have constants"
            emit_streams(self.emit, work)
        self.emit.call(isa.LAYER, index)

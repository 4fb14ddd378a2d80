"""What operators cost before anything has an address: by the simulator's prices of the commands they would issue."""

from collections.abc import Sequence

from qcompiler.backends.npu_cascade import Operator
from qcompiler.backends.npu_constants import Constants
from qcompiler.backends.npu_emit import WordEmitter
from qcompiler.backends.npu_tiling import Address, Repeated, Tile, Window
from qcompiler.simulator import isa
from qcompiler.simulator.cost import Operations
from qcompiler.simulator.weight_code import ratio_at
from qcompiler.target import Target


class TargetClock:
    """The clock of one region on one target, as `npu_cascade_plan.Clock` asks."""

    def __init__(self, target: Target, constants: Constants, blob: int) -> None:
        assert target.npu is not None, f"{target.name} has no accelerator"
        self.constants, self.blob = constants, blob
        self.operations = Operations(target, {blob: target.npu.weight_memory}, {blob: constants.encoded})
        self.known: dict[tuple[int, int, int, bool], int] = {}

    def cycles(self, operator: Operator, rows: int, depth: int, *, in_place: bool) -> float:
        """Of the engine, for a tile of so many rows and channels from the middle of the map."""
        key = (operator.step, rows, depth, in_place)
        if key not in self.known:
            self.known[key] = self.operations.cycles(self._words(operator, rows, depth, in_place=in_place))
        return self.known[key]

    def encoded(self, operator: Operator, stream: int) -> float:
        """Bytes that DMA moves of all of a stream."""
        ratio = ratio_at(self.constants.encoded, self.constants.streams[operator.step][stream])
        return ratio * len(operator.work.streams[stream].data)

    def _words(self, operator: Operator, rows: int, depth: int, *, in_place: bool) -> Sequence[int]:
        work, emit = operator.work, WordEmitter()
        windows: list[tuple[Window, Window, Window]] = []
        _, _, width, _ = work.ofm
        for slot, (operand, access) in enumerate(zip(work.maps, operator.maps, strict=True)):
            y = Window(0, rows if isinstance(operand.y, Repeated) else operand.y.extent(rows))
            x, c = operand.x.window(0, width, width), operand.c.window(0, depth, depth)
            windows.append((y, x, c))
            strides = (access.strides[1], access.strides[2], operand.element)
            emit.call(
                isa.IFM,
                *(slot, isa.SCRATCHPAD, 0, y.count, x.count, c.count),
                *(
                    0 if isinstance(span, Repeated) else stride
                    for span, stride in zip(operand.spans, strides, strict=True)
                ),
                *(operand.dtype, operand.zero_point),
            )
        _, y_stride, x_stride, _ = operator.ofm.strides
        emit.call(
            isa.OFM,
            *(isa.SCRATCHPAD, 0, rows, width, depth, y_stride, x_stride, work.dtype, work.zero_point, *work.clamp),
        )
        streams = tuple(
            Address(self.blob, offset) if in_place else Address(isa.SCRATCHPAD, 0)
            for offset in self.constants.streams[operator.step]
        )
        work.issue(emit, Tile((0, 0, 0), depth, depth, tuple(windows), streams))
        return emit.words

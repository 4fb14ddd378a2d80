"""What tests of the NPU backend share: integer graphs built node by node, and drivers run on the simulator."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import tvm

from qcompiler.backends import npu
from qcompiler.backends.npu_layers import recipe_of
from qcompiler.backends.npu_tiling import Work, smallest_need
from qcompiler.graph import QCOMPILER_DOMAIN, add_initializer, dtype_of, make_node, shape_of, value_name
from qcompiler.integer import ops
from qcompiler.integer.reference import execute
from qcompiler.partition import Region
from qcompiler.quant import arithmetic, interpolation, tflite_functions
from qcompiler.quant.arithmetic import RequantizeVariant
from qcompiler.simulator.machine import Log
from qcompiler.target import Target
from qcompiler.target_loader import load_target

INT4, INT8, UINT8, INT16 = ir.DataType.INT4, ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT16
EIGHT, WIDE = (INT8, UINT8), (INT16, INT16, INT8)
"""Types of feature maps; the latter mostly of 16 bits, at times a change of width."""
Maps = tuple[ir.DataType, ...]
Shape = tuple[int, ...]


def with_scratchpad(size: int, variant: RequantizeVariant = "tflite", *, rolling: bool = True) -> Target:
    """The bundled arm-npu with another scratchpad, and with rolling buffers or without."""
    target = load_target("arm-npu")
    assert target.npu is not None
    scratchpad = target.npu.scratchpad.model_copy(update={"size": size})
    memories = {**target.npu.memories, target.npu.memory_name("scratchpad"): scratchpad}
    return target.model_copy(
        update={
            "npu": target.npu.model_copy(update={"memories": memories, "rolling_buffers": rolling}),
            "quantization": target.quantization.model_copy(update={"requantize": variant}),
        }
    )


class Net:
    """Builds an integer graph node by node."""

    def __init__(
        self,
        seed: int,
        variant: RequantizeVariant = "tflite",
        weights: Sequence[ir.DataType] = (INT8, UINT8),
        maps: Sequence[ir.DataType] = EIGHT,
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.variant: RequantizeVariant = variant
        self.weights, self.maps = weights, maps
        self.graph = ir.Graph([], [], nodes=[], opset_imports={"": 21, QCOMPILER_DOMAIN: 1}, name="net")
        self._names = count()

    def value(self, shape: Shape, dtype: ir.DataType) -> ir.Value:
        return ir.Value(name=f"v{next(self._names)}", shape=ir.Shape(shape), type=ir.TensorType(dtype))

    def input(self, *shape: int, dtype: ir.DataType | None = None) -> ir.Value:
        value = self.value(shape, dtype or self.maps[0])
        self.graph.inputs.append(value)
        return value

    def constant(self, array: np.ndarray) -> ir.Value:
        return add_initializer(self.graph, f"c{next(self._names)}", array)

    def dtype(self) -> ir.DataType:
        return self.maps[int(self.rng.integers(len(self.maps)))]

    def eight(self) -> ir.DataType:
        return EIGHT[int(self.rng.integers(2))]

    def weight_dtype(self, x: ir.Value) -> ir.DataType:
        """Signed for 16-bit maps."""
        kinds = self.weights if x.dtype != INT16 else [dtype for dtype in self.weights if dtype != UINT8]
        return kinds[int(self.rng.integers(len(kinds)))]

    def zero_point(self, dtype: ir.DataType, x: ir.Value | None = None) -> int:
        """Any; 0 of 16-bit maps, and of the weights they are multiplied by."""
        if dtype == INT16 or (x is not None and x.dtype == INT16):
            return 0
        low, high = limits(dtype)
        return int(self.rng.integers(low, high + 1))

    def random(self, shape: Shape, dtype: ir.DataType) -> np.ndarray:
        low, high = limits(dtype)
        return self.rng.integers(low, high + 1, shape).astype(dtype.numpy())

    def clamp(self, dtype: ir.DataType) -> tuple[int, int]:
        low, high = limits(dtype)
        return low + int(self.rng.integers(0, 20)), high - int(self.rng.integers(0, 20))

    def scales(self, count: int, typical: float) -> tuple[ir.Value, ir.Value]:
        """Rescale factors around `typical`, encoded for the net's variant."""
        factors = typical * self.rng.uniform(0.5, 2, count)
        if self.variant == "shift":
            factors = np.exp2(np.round(np.log2(factors)))
        multiplier, shift = arithmetic.multipliers(factors, self.variant)
        return self.constant(multiplier), self.constant(shift)

    def add(self, node: ir.Node) -> ir.Value:
        self.graph.append(node)
        return node.outputs[0]

    def integer(self, op: ops.IntegerOp, inputs: list[ir.Value], shape: Shape, dtype: ir.DataType) -> ir.Value:
        output = self.value(shape, dtype)
        return self.add(op.node(inputs, output, f"n_{output.name}"))

    def standard(
        self, op: str, inputs: Sequence[ir.Value | None], shapes: Sequence[Shape], **attributes: int
    ) -> ir.Node:
        dtype = inputs[0].dtype if inputs[0] is not None else None
        assert dtype is not None
        outputs = [self.value(shape, dtype) for shape in shapes]
        node = make_node(op, inputs, outputs, dict(attributes), name=f"n_{outputs[0].name}")
        self.graph.append(node)
        return node

    # --- operators ---

    def conv(
        self,
        x: ir.Value,
        depth: int,
        kernel: tuple[int, int] = (3, 3),
        strides: tuple[int, int] = (1, 1),
        pads: tuple[int, int, int, int] = (1, 1, 1, 1),
        dilations: tuple[int, int] = (1, 1),
        group: int = 1,
    ) -> ir.Value:
        n, h, w, _ = shape_of(x)
        size = [
            (full + pads[i] + pads[i + 2] - (kernel[i] - 1) * dilations[i] - 1) // strides[i] + 1
            for i, full in enumerate((h, w))
        ]
        return self._weighted(ops.QConv, x, (n, *size, depth), kernel, strides, pads, dilations, group)

    def conv_transpose(
        self,
        x: ir.Value,
        depth: int,
        kernel: tuple[int, int],
        strides: tuple[int, int],
        pads: tuple[int, int, int, int],
        dilations: tuple[int, int] = (1, 1),
        group: int = 1,
        extra: int = 0,
    ) -> ir.Value:
        n, h, w, _ = shape_of(x)
        size = [
            (full - 1) * strides[i] + (kernel[i] - 1) * dilations[i] + 1 - pads[i] - pads[i + 2] + extra
            for i, full in enumerate((h, w))
        ]
        return self._weighted(ops.QConvTranspose, x, (n, *size, depth), kernel, strides, pads, dilations, group)

    def _weighted(
        self,
        kind: type[ops.QConv] | type[ops.QConvTranspose],
        x: ir.Value,
        shape: Shape,
        kernel: tuple[int, int],
        strides: tuple[int, int],
        pads: tuple[int, int, int, int],
        dilations: tuple[int, int],
        group: int,
    ) -> ir.Value:
        depth, w_dtype, y_dtype = shape[-1], self.weight_dtype(x), self.dtype()
        in_group = shape_of(x)[-1] // group
        weights = self.constant(self.random((depth, *kernel, in_group), w_dtype))
        bias = self.constant(self.rng.integers(-2000, 2000, depth).astype(np.int32))
        typical = 0.5 / (90 * (kernel[0] * kernel[1] * in_group) ** 0.5)
        scales = self.scales(depth, typical * widening(y_dtype, x))
        assert x.dtype is not None
        op = kind(
            kernel, strides, pads, dilations, group, self.zero_point(x.dtype), self.zero_point(w_dtype, x),
            self.zero_point(y_dtype), *self.clamp(y_dtype), self.variant,
        )  # fmt: skip
        return self.integer(op, [x, weights, bias, *scales], shape, y_dtype)

    def gemm(self, x: ir.Value, depth: int) -> ir.Value:
        m, k = shape_of(x)
        w_dtype, y_dtype = self.weight_dtype(x), self.dtype()
        weights = self.constant(self.random((depth, k), w_dtype))
        bias = self.constant(self.rng.integers(-2000, 2000, depth).astype(np.int32))
        assert x.dtype is not None
        op = ops.QGemm(
            self.zero_point(x.dtype), self.zero_point(w_dtype, x), self.zero_point(y_dtype), *self.clamp(y_dtype),
            self.variant,
        )  # fmt: skip
        scales = self.scales(depth, 0.5 / (90 * k**0.5) * widening(y_dtype, x))
        return self.integer(op, [x, weights, bias, *scales], (m, depth), y_dtype)

    def sum(self, a: ir.Value, b: ir.Value, *, subtract: int = 0) -> ir.Value:
        y_dtype = self.dtype()
        scale_a, scale_b, scale_y = (float(scale) for scale in self.rng.uniform(0.01, 0.1, 3))
        bits = 8 * dtype_of(a).itemsize
        factors = arithmetic.add_factors(scale_a, scale_b, scale_y / widening(y_dtype, a), self.variant, bits=bits)
        assert a.dtype is not None and b.dtype is not None
        op = ops.QAdd(
            subtract, self.zero_point(a.dtype), self.zero_point(b.dtype), self.zero_point(y_dtype), *factors,
            *self.clamp(y_dtype), self.variant,
        )  # fmt: skip
        return self.integer(op, [a, b], np.broadcast_shapes(shape_of(a), shape_of(b)), y_dtype)

    def product(self, a: ir.Value, b: ir.Value) -> ir.Value:
        y_dtype = self.dtype()
        assert a.dtype is not None and b.dtype is not None
        op = ops.QMul(
            self.zero_point(a.dtype), self.zero_point(b.dtype), self.zero_point(y_dtype), *self.clamp(y_dtype),
            self.variant,
        )  # fmt: skip
        shape = np.broadcast_shapes(shape_of(a), shape_of(b))
        return self.integer(op, [a, b, *self.scales(1, 0.01 * widening(y_dtype, a, b))], shape, y_dtype)

    def max_pool(
        self,
        x: ir.Value,
        kernel: tuple[int, int],
        strides: tuple[int, int],
        pads: tuple[int, int, int, int],
        dilations: tuple[int, int] = (1, 1),
    ) -> ir.Value:
        assert x.dtype is not None
        op = ops.QMaxPool(kernel, strides, pads, dilations, *self.clamp(x.dtype))
        return self.integer(op, [x], pooled(x, kernel, strides, pads, dilations), x.dtype)

    def average_pool(
        self,
        x: ir.Value,
        kernel: tuple[int, int],
        strides: tuple[int, int],
        pads: tuple[int, int, int, int],
        counted: int,
    ) -> ir.Value:
        y_dtype = self.dtype()
        assert x.dtype is not None
        op = ops.QAveragePool(
            kernel, strides, pads, counted, self.zero_point(x.dtype), self.zero_point(y_dtype), *self.clamp(y_dtype),
            self.variant,
        )  # fmt: skip
        scales = self.scales(kernel[0] * kernel[1], widening(y_dtype, x) / (kernel[0] * kernel[1]))
        return self.integer(op, [x, *scales], pooled(x, kernel, strides, pads, (1, 1)), y_dtype)

    def reduce_mean(self, x: ir.Value, axes: tuple[int, ...], *, keep: bool) -> ir.Value:
        y_dtype, shape = self.dtype(), shape_of(x)
        assert x.dtype is not None
        op = ops.QReduceMean(
            axes, self.zero_point(x.dtype), self.zero_point(y_dtype), *self.clamp(y_dtype), self.variant
        )
        reduced = [1 if axis in axes else size for axis, size in enumerate(shape)]
        kept = reduced if keep else [size for axis, size in enumerate(shape) if axis not in axes]
        elements = int(np.prod([shape[axis] for axis in axes]))
        return self.integer(op, [x, *self.scales(1, widening(y_dtype, x) / elements)], tuple(kept), y_dtype)

    def requantize(self, x: ir.Value, dtype: ir.DataType | None = None) -> ir.Value:
        y_dtype = dtype or self.dtype()
        assert x.dtype is not None
        op = ops.QRequantize(self.zero_point(x.dtype), self.zero_point(y_dtype), *self.clamp(y_dtype), self.variant)
        return self.integer(op, [x, *self.scales(1, 0.8 * widening(y_dtype, x))], shape_of(x), y_dtype)

    def lookup(self, x: ir.Value) -> ir.Value:
        wide = x.dtype == INT16
        y_dtype = INT16 if wide else self.eight()
        # Any table will do, but that straight lines of 16 bits stay within the type.
        table = self.constant(self.random((interpolation.ENTRIES if wide else 256,), y_dtype))
        return self.integer(ops.QLookup("Tanh"), [x, table], shape_of(x), y_dtype)

    def softmax(self, x: ir.Value) -> ir.Value:
        scale = float(self.rng.uniform(0.01, 0.2))
        if x.dtype == INT16:
            wide = ops.QSoftmax(ops.TFLITE_SOFTMAX, 0, 0, 32767)
            entries = interpolation.softmax_table(scale / 256)
            return self.integer(wide, [x, self.constant(entries)], shape_of(x), INT16)
        y_dtype = self.eight()
        table, inverse_scale = arithmetic.softmax_tables(scale, 1 / 256)
        if self.variant == "tflite":
            table, inverse_scale = tflite_functions.softmax_table(scale), ops.TFLITE_SOFTMAX
        op = ops.QSoftmax(inverse_scale, self.zero_point(y_dtype), *limits(y_dtype))
        return self.integer(op, [x, self.constant(table)], shape_of(x), y_dtype)

    def resize(self, x: ir.Value, size: tuple[int, int], *, linear: bool) -> ir.Value:
        n, h, w, c = shape_of(x)
        assert x.dtype is not None
        tables: list[np.ndarray] = []
        for full, wanted in zip((h, w), size, strict=True):
            position = np.clip((np.arange(wanted) + 0.5) * full / wanted - 0.5, 0, full - 1)
            low = np.floor(position).astype(np.int32)
            if linear:
                weight = np.rint((position - low) * 2048).astype(np.int32)
                tables += [np.stack([low, np.minimum(low + 1, full - 1)], 1), np.stack([2048 - weight, weight], 1)]
            else:
                tables.append(low)
        op = ops.QResizeLinear() if linear else ops.QResizeNearest()
        inputs = [x, *(self.constant(table.astype(np.int32)) for table in tables)]
        return self.integer(op, inputs, (n, *size, c), x.dtype)

    def reshape(self, x: ir.Value, *shape: int) -> ir.Value:
        return self.standard("Reshape", [x, self.constant(np.array(shape, np.int64))], [shape]).outputs[0]

    def transpose(self, x: ir.Value, *perm: int) -> ir.Value:
        shape = tuple(shape_of(x)[axis] for axis in perm)
        output = self.value(shape, x.dtype or INT8)
        return self.add(make_node("Transpose", [x], [output], {"perm": perm}, name=f"n_{output.name}"))

    def concat(self, values: Sequence[ir.Value], axis: int) -> ir.Value:
        shape = list(shape_of(values[0]))
        shape[axis] = sum(shape_of(value)[axis] for value in values)
        return self.standard("Concat", values, [tuple(shape)], axis=axis).outputs[0]

    def split(self, x: ir.Value, axis: int, sizes: Sequence[int]) -> list[ir.Value]:
        shape = shape_of(x)
        shapes = [tuple(size if k == axis else full for k, full in enumerate(shape)) for size in sizes]
        return list(self.standard("Split", [x, self.constant(np.array(sizes, np.int64))], shapes, axis=axis).outputs)

    def slice(self, x: ir.Value, starts: Shape, ends: Shape, axes: Shape, steps: Shape) -> ir.Value:
        index = [slice(None)] * len(shape_of(x))
        for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
            index[axis] = slice(start, end, step)
        shape = np.empty(shape_of(x), np.int8)[tuple(index)].shape
        constants = [self.constant(np.array(item, np.int64)) for item in (starts, ends, axes, steps)]
        return self.standard("Slice", [x, *constants], [shape]).outputs[0]

    def pad(self, x: ir.Value, before: Shape, after: Shape) -> ir.Value:
        shape = tuple(b + size + a for b, size, a in zip(before, shape_of(x), after, strict=True))
        value = self.random((), x.dtype or INT8)
        constants = [self.constant(np.array((*before, *after), np.int64)), self.constant(value)]
        return self.standard("Pad", [x, *constants], [shape]).outputs[0]

    def clip(self, x: ir.Value) -> ir.Value:
        assert x.dtype is not None
        bounds = [self.constant(np.array(bound, x.dtype.numpy())) for bound in self.clamp(x.dtype)]
        return self.standard("Clip", [x, *bounds], [shape_of(x)]).outputs[0]

    def done(self, *outputs: ir.Value) -> ir.Model:
        """The model; its outputs are those given, else every value nobody reads."""
        values = [value for node in self.graph for value in node.outputs]
        self.graph.outputs.extend(outputs or [value for value in values if not value.uses()])
        return ir.Model(self.graph, ir_version=10)


def widening(dtype: ir.DataType, *operands: ir.Value) -> float:
    """By how much the output's range exceeds what comes of 8-bit operands and gives 8 bits."""
    return 2.0 ** (dtype.bitwidth - 8 - sum(8 * dtype_of(value).itemsize - 8 for value in operands))


def pair(rng: np.random.Generator, low: int, high: int) -> tuple[int, int]:
    first, second = rng.integers(low, high, 2)
    return int(first), int(second)


def limits(dtype: ir.DataType) -> tuple[int, int]:
    info = ml_dtypes.iinfo(dtype.numpy())
    return int(info.min), int(info.max)


def pooled(
    x: ir.Value, kernel: tuple[int, int], strides: tuple[int, int], pads: Shape, dilations: tuple[int, int]
) -> Shape:
    n, h, w, c = shape_of(x)
    y, x_ = (
        (full + pads[i] + pads[i + 2] - (kernel[i] - 1) * dilations[i] - 1) // strides[i] + 1
        for i, full in enumerate((h, w))
    )
    return n, y, x_, c


# --- running ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    label: str
    model: ir.Model
    program: npu.NpuProgram
    target: Target


def whole(model: ir.Model) -> Region:
    nodes = tuple(model.graph)
    return Region("region", "npu", nodes, tuple(model.graph.inputs), tuple(model.graph.outputs))


def need_of(model: ir.Model) -> int:
    """The scratchpad below which some node's smallest tile does not fit."""
    target = with_scratchpad(1 << 24)
    recipes = [recipe_of(node, target) for node in model.graph]
    return max((smallest_need(recipe, 16) for recipe in recipes if isinstance(recipe, Work)), default=16)


def cases(label: str, model: ir.Model, variant: RequantizeVariant = "tflite") -> Iterator[Case]:
    """One model on a roomy scratchpad, a tight one and the smallest there can be."""
    need = need_of(model)
    for size in sorted({1 << 20, 3 * need, need}):
        target = with_scratchpad(size, variant)
        reasons = [npu.can_run(node, target) for node in model.graph]
        assert reasons == [None] * len(reasons), label
        yield Case(f"{label}, {size} bytes", model, npu.compile_region(whole(model), target), target)


Check = Callable[[Sequence[Case]], None]


def check_cases(all_cases: Sequence[Case], simulator: Path, folder: Path) -> None:
    """Build all drivers into one library; compare every output with the reference and every log with the words."""
    functions = {f"driver_{i}": npu.driver(case.program, f"driver_{i}", i) for i, case in enumerate(all_cases)}
    library = folder / "drivers.so"
    executable = tvm.compile(tvm.IRModule(functions), target=tvm.target.Target({"kind": "llvm", "opt-level": 0}))
    executable.export_library(str(library), addons=[str(simulator)])
    module, log = tvm.runtime.load_module(str(library)), Log(library)
    rng = np.random.default_rng(len(all_cases))
    for i, case in enumerate(all_cases):
        feeds = {value_name(value): draw(rng, value) for value in case.model.graph.inputs}
        expected = execute(case.model, feeds)
        outputs = [tvm.runtime.tensor(np.full(t.shape, 77, t.dtype)) for t in case.program.outputs]
        workspace = np.full(max(1, case.program.workspace_bytes), 0x5A, np.uint8)
        arguments = [*feeds.values(), case.program.blob.copy()]
        log.reset()
        module[f"driver_{i}"](*map(tvm.runtime.tensor, arguments), *outputs, tvm.runtime.tensor(workspace))
        for output, tensor in zip(outputs, case.program.outputs, strict=True):
            np.testing.assert_array_equal(output.numpy(), expected[tensor.name], err_msg=case.label)
        words = npu.words(case.program)
        np.testing.assert_array_equal(log.words(), words, err_msg=case.label)
        assert [number for number, _ in log.regions()] == [i]
        assert log.scratchpad_peak() == case.program.scratchpad.peak <= case.target.npu.scratchpad.size  # pyright: ignore[reportOptionalMemberAccess]


def draw(rng: np.random.Generator, value: ir.Value) -> np.ndarray:
    """Any values of its dtype."""
    info = np.iinfo(dtype_of(value))
    return rng.integers(info.min, info.max + 1, shape_of(value)).astype(dtype_of(value))

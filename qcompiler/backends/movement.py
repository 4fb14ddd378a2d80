"""Operators that move elements about without arithmetic, for every element type."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qcompiler.backends import te
from qcompiler.backends.base import HostCode, Kernel, Lowering, View, placeholder
from qcompiler.backends.cpu_elementwise import constant_input
from qcompiler.backends.te import Expr, Tensor
from qcompiler.graph import (
    Shape,
    const_of,
    data_input,
    dtype_of,
    element_count,
    input_of,
    integer,
    ints,
    shape_of,
    string,
)

Element = Callable[..., Expr]


def moved(
    output: ir.Value,
    inputs: Sequence[ir.Value],
    element: Callable[[Sequence[Tensor]], Element],
    *,
    shapes: Sequence[Shape] | None = None,
    out: Shape | None = None,
) -> Kernel:
    """A kernel whose output element is read somewhere in the inputs.

    `element` takes the input tensors and gives the function from output indices to the element; `shapes` and
    `out` are the shapes these see, if not the values' own.
    """
    seen = [shape_of(value) for value in inputs] if shapes is None else shapes
    tensors = [placeholder(*pair, f"x{index}") for index, pair in enumerate(zip(inputs, seen, strict=True))]
    result = te.compute(shape_of(output) if out is None else out, element(tensors), "output")
    return Kernel(te.prim_func([*tensors, result]), tuple(inputs))


def view(node: ir.Node, host: HostCode) -> Lowering:
    """Reshape, Flatten, Squeeze, Unsqueeze, Identity, Dropout at inference."""
    return View(data_input(node))


def transpose(node: ir.Node, host: HostCode) -> Lowering:
    rank = len(shape_of(data_input(node)))
    return permuted(data_input(node), node.outputs[0], ints(node, "perm", tuple(reversed(range(rank)))))


def permuted(value: ir.Value, output: ir.Value, order: Sequence[int]) -> Lowering:
    """The value with its axes in another order."""
    shape = shape_of(value)
    merged = _merge_axes(shape, order)
    if len(merged) <= 1:
        return View(value)
    # Runs of axes that stay together are one axis each; `start` is where a run stood in the input.
    by_start = sorted(merged)
    position = [by_start.index(run) for run in merged]
    inverse = [position.index(axis) for axis in range(len(merged))]
    return moved(
        output,
        [value],
        lambda tensors: lambda *index: tensors[0][tuple(index[axis] for axis in inverse)],
        shapes=[tuple(size for _, size in by_start)],
        out=tuple(size for _, size in merged),
    )


def _merge_axes(shape: Shape, order: Sequence[int]) -> list[tuple[int, int]]:
    """The permutation's runs of consecutive axes, dimensions of 1 left out: (first axis, elements), in output order."""
    wide = [axis for axis in range(len(shape)) if shape[axis] != 1]
    runs: list[tuple[int, int]] = []
    previous = -2
    for axis in order:
        if shape[axis] == 1:
            continue
        place = wide.index(axis)
        if runs and place == previous + 1:
            runs[-1] = (runs[-1][0], runs[-1][1] * shape[axis])
        else:
            runs.append((axis, shape[axis]))
        previous = place
    return runs


def concat(node: ir.Node, host: HostCode) -> Lowering:
    inputs = [value for value in node.inputs if value is not None]
    return joined(inputs, node.outputs[0], integer(node, "axis"))


def joined(values: Sequence[ir.Value], output: ir.Value, axis: int) -> Lowering:
    """The values one after another along an axis."""
    inputs = [value for value in values if element_count(shape_of(value))]
    if len(inputs) == 1:
        return View(inputs[0])
    out = shape_of(output)
    axis = axis % len(out)
    outer = element_count(out[:axis])
    widths = [element_count(shape_of(value)[axis:]) for value in inputs]
    starts = [sum(widths[:index]) for index in range(len(widths))]

    def element(tensors: Sequence[Tensor]) -> Element:
        def piece(row: Expr, column: Expr) -> Expr:
            chosen = tensors[-1][row, column - starts[-1]]
            for tensor, start, width in reversed(list(zip(tensors[:-1], starts, widths, strict=False))):
                chosen = te.if_then_else(te.inside(column < start + width), tensor[row, column - start], chosen)
            return chosen

        return piece

    return moved(output, inputs, element, shapes=[(outer, width) for width in widths], out=(outer, sum(widths)))


def split(node: ir.Node, host: HostCode) -> Lowering:
    shape = shape_of(data_input(node))
    axis = integer(node, "axis", 0) % len(shape)
    outer, width = element_count(shape[:axis]), element_count(shape[axis:])
    x = placeholder(data_input(node), (outer, width))
    outputs: list[Tensor] = []
    start = 0
    for value in node.outputs:
        size = element_count(shape_of(value)[axis:])
        outputs.append(te.compute((outer, size), _shifted_column(x, start), f"piece{len(outputs)}"))
        start += size
    return Kernel(te.prim_func([x, *outputs]), (data_input(node),))


def _shifted_column(x: Tensor, start: int) -> Element:
    return lambda row, column: x[row, column + start]


def slice_(node: ir.Node, host: HostCode) -> Lowering:
    shape = shape_of(data_input(node))
    starts = constant_input(node, 1).tolist()
    axes_input, steps_input = const_of(input_of(node, 3)), const_of(input_of(node, 4))
    axes = axes_input.tolist() if axes_input is not None else list(range(len(starts)))
    steps = steps_input.tolist() if steps_input is not None else [1] * len(starts)
    first, stride = [0] * len(shape), [1] * len(shape)
    for start, axis, step in zip(starts, axes, steps, strict=True):
        # Python's own rules for negative and far-off bounds; the output's shape already knows the end.
        first[axis], _, stride[axis] = slice(int(start), None, int(step)).indices(shape[axis])
    return moved(
        node.outputs[0],
        [data_input(node)],
        lambda tensors: (
            lambda *index: tensors[0][
                tuple(i * step + start for i, start, step in zip(index, first, stride, strict=True))
            ]
        ),
    )


def pad(node: ir.Node, host: HostCode) -> Lowering:
    shape, dtype = shape_of(data_input(node)), str(dtype_of(data_input(node)))
    mode = string(node, "mode", "constant")
    pads, axes_input = constant_input(node, 1).tolist(), const_of(input_of(node, 3))
    axes = axes_input.tolist() if axes_input is not None else list(range(len(shape)))
    before = [0] * len(shape)
    for axis, low in zip(axes, pads[: len(axes)], strict=True):
        before[axis] = int(low)
    fill = const_of(input_of(node, 2))
    filling = te.const(fill.item() if fill is not None else 0, dtype)

    def element(tensors: Sequence[Tensor]) -> Element:
        def read(*index: Expr) -> Expr:
            source = [i - low for i, low in zip(index, before, strict=True)]
            if mode == "constant":
                inside = [test for i, size in zip(source, shape, strict=True) for test in (i >= 0, i < size)]
                return te.if_then_else(te.inside(*inside), tensors[0][tuple(source)], filling)
            return tensors[0][tuple(_border(i, size, mode) for i, size in zip(source, shape, strict=True))]

        return read

    return moved(node.outputs[0], [data_input(node)], element)


def _border(i: Expr, size: int, mode: str) -> Expr:
    """Where padding reads: the nearest element, the mirror image without its edge, or the other end."""
    if mode == "edge":
        return te.minimum(te.maximum(i, 0), size - 1)
    if mode == "wrap":
        return i % size
    assert mode == "reflect", mode
    period = max(2 * (size - 1), 1)
    folded = i % period
    return te.minimum(folded, period - folded) if size > 1 else i * 0


def expand(node: ir.Node, host: HostCode) -> Lowering:
    shape, out = shape_of(data_input(node)), shape_of(node.outputs[0])
    ranked = (1,) * (len(out) - len(shape)) + shape
    if ranked == out:
        return View(data_input(node))
    return moved(
        node.outputs[0],
        [data_input(node)],
        lambda tensors: (
            lambda *index: tensors[0][tuple(0 if size == 1 else i for i, size in zip(index, ranked, strict=True))]
        ),
        shapes=[ranked],
    )


def tile(node: ir.Node, host: HostCode) -> Lowering:
    shape = shape_of(data_input(node))
    return moved(
        node.outputs[0],
        [data_input(node)],
        lambda tensors: lambda *index: tensors[0][tuple(i % size for i, size in zip(index, shape, strict=True))],
    )


def gather(node: ir.Node, host: HostCode) -> Lowering:
    data, indices = data_input(node), data_input(node, 1)
    shape, index_shape = shape_of(data), shape_of(indices)
    axis = integer(node, "axis", 0) % len(shape)
    outer, size, inner = element_count(shape[:axis]), shape[axis], element_count(shape[axis + 1 :])
    count = element_count(index_shape)
    return moved(
        node.outputs[0],
        [data, indices],
        lambda tensors: lambda o, i, j: tensors[0][o, _wrapped(tensors[1][i], size), j],
        shapes=[(outer, size, inner), (count,)],
        out=(outer, count, inner),
    )


def gather_elements(node: ir.Node, host: HostCode) -> Lowering:
    shape = shape_of(data_input(node))
    axis = integer(node, "axis", 0) % len(shape)

    def element(tensors: Sequence[Tensor]) -> Element:
        def read(*index: Expr) -> Expr:
            chosen = _wrapped(tensors[1][index], shape[axis])
            return tensors[0][(*index[:axis], chosen, *index[axis + 1 :])]

        return read

    return moved(node.outputs[0], [data_input(node), data_input(node, 1)], element)


def gather_nd(node: ir.Node, host: HostCode) -> Lowering:
    shape, index_shape = shape_of(data_input(node)), shape_of(data_input(node, 1))
    batch, depth = integer(node, "batch_dims", 0), index_shape[-1]
    own = len(index_shape) - 1

    def element(tensors: Sequence[Tensor]) -> Element:
        def read(*index: Expr) -> Expr:
            tuples = [_wrapped(tensors[1][(*index[:own], d)], shape[batch + d]) for d in range(depth)]
            return tensors[0][(*index[:batch], *tuples, *index[own:])]

        return read

    return moved(node.outputs[0], [data_input(node), data_input(node, 1)], element)


def _wrapped(index: Expr, size: int) -> Expr:
    """An index from memory as int32, negative ones counted from the end."""
    narrow = index.astype("int32")
    return te.where(narrow < 0, narrow + size, narrow)


def depth_to_space(node: ir.Node, host: HostCode) -> Lowering:
    c = shape_of(data_input(node))[1]
    block = integer(node, "blocksize")
    depth = c // (block * block)
    blocks_first = string(node, "mode", "DCR") == "DCR"

    def element(tensors: Sequence[Tensor]) -> Element:
        def read(b: Expr, k: Expr, i: Expr, j: Expr) -> Expr:
            within = (i % block) * block + j % block
            channel = within * depth + k if blocks_first else k * (block * block) + within
            return tensors[0][b, channel, i // block, j // block]

        return read

    return moved(node.outputs[0], [data_input(node)], element)


def space_to_depth(node: ir.Node, host: HostCode) -> Lowering:
    c = shape_of(data_input(node))[1]
    block = integer(node, "blocksize")

    def element(tensors: Sequence[Tensor]) -> Element:
        def read(b: Expr, k: Expr, i: Expr, j: Expr) -> Expr:
            within = k // c
            return tensors[0][b, k % c, i * block + within // block, j * block + within % block]

        return read

    return moved(node.outputs[0], [data_input(node)], element)


def trilu(node: ir.Node, host: HostCode) -> Lowering:
    offset_input = const_of(input_of(node, 1))
    offset = int(offset_input.item()) if offset_input is not None else 0
    upper, dtype = bool(integer(node, "upper", 1)), str(dtype_of(data_input(node)))

    def element(tensors: Sequence[Tensor]) -> Element:
        def read(*index: Expr) -> Expr:
            row, column = index[-2:]
            kept = column >= row + offset if upper else column <= row + offset
            return te.where(kept, tensors[0][index], te.const(0, dtype))

        return read

    return moved(node.outputs[0], [data_input(node)], element)


def one_hot(node: ir.Node, host: HostCode) -> Lowering:
    out = shape_of(node.outputs[0])
    axis = integer(node, "axis", -1) % len(out)
    off, on = (te.const(number.item(), str(number.dtype)) for number in constant_input(node, 2))

    def element(tensors: Sequence[Tensor]) -> Element:
        def read(*index: Expr) -> Expr:
            place = tensors[0][(*index[:axis], *index[axis + 1 :])].astype("int32")
            return te.where(_wrapped(place, out[axis]).equal(index[axis]), on, off)

        return read

    return moved(node.outputs[0], [data_input(node)], element)


def constant_of_shape(node: ir.Node, host: HostCode) -> Lowering:
    attribute = node.attributes.get("value")
    value = attribute.as_tensor().numpy().reshape(()) if attribute is not None else np.float32(0)
    filling = te.const(value.item(), str(value.dtype))
    return moved(node.outputs[0], [], lambda tensors: lambda *index: filling)


LOWERINGS: Mapping[str, Callable[[ir.Node, HostCode], Lowering]] = {
    "Concat": concat,
    "ConstantOfShape": constant_of_shape,
    "DepthToSpace": depth_to_space,
    "Dropout": view,
    "Expand": expand,
    "Flatten": view,
    "Gather": gather,
    "GatherElements": gather_elements,
    "GatherND": gather_nd,
    "Identity": view,
    "OneHot": one_hot,
    "Pad": pad,
    "Reshape": view,
    "Slice": slice_,
    "SpaceToDepth": space_to_depth,
    "Split": split,
    "Squeeze": view,
    "Tile": tile,
    "Transpose": transpose,
    "Trilu": trilu,
    "Unsqueeze": view,
}

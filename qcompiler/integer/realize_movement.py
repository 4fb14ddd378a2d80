"""Operators that only move quantized elements about: they run on the integers, in the input's own format."""

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from qcompiler.graph import Attribute, const_of, data_input, input_of, integer, ints, shape_of, string
from qcompiler.integer import ops
from qcompiler.integer.builder import (
    Builder,
    Output,
    Quantized,
    format_of,
    four_pads,
    needed_strides,
    rows_and_columns,
    window_pads,
)
from qcompiler.integer.formats import record
from qcompiler.integer.resize import is_plain_resize, nearest_table, spatial_scales

_RESHAPES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
_SAME_INPUTS = ("Transpose", "Slice", "Split", "Expand", "Tile", "Gather")
"""Operators whose first input is data and whose others are known shapes, indices and axes."""


class Forms:
    """The integers behind float values: what a DequantizeLinear reads, moved about as the float values are."""

    def __init__(self, builder: Builder) -> None:
        self._builder = builder
        self._known: dict[ir.Value, Quantized | None] = {}

    def of(self, value: ir.Value | None) -> Quantized | None:
        """The integer tensor whose dequantized elements are exactly `value`, or None.

        Adds the integer movement nodes it takes, once per value.
        """
        if value is None:
            return None
        if value not in self._known:
            self._known[value] = self._find(value)
        return self._known[value]

    def convert(self, x: Quantized, out: Output) -> ir.Value:
        """`x` in the format of `out`, clamped: x itself, a Clip, a QRequantize, or a constant."""
        builder, limits = self._builder, out.format.limits
        array = const_of(x.value)
        if array is not None:
            if x.format == out.format and out.clamp == limits:
                return x.value
            moved = np.clip(out.format.quantize(x.format.dequantize(array)), *out.clamp)
            return builder.constant(moved.astype(array.dtype if x.format == out.format else moved.dtype), out.name)
        if x.format == out.format:
            return x.value if out.clamp == limits else clip(builder, x.value, out.clamp, out.name)
        op = ops.QRequantize(x.format.zero_point, out.format.zero_point, *out.clamp, builder.variant)
        factors = builder.encoded(builder.factor([x.format.scale], out.format.scale), out.name)
        return builder.operator(op, [x.value, *factors], x.shape, out.format.dtype, out.name)

    def _find(self, value: ir.Value) -> Quantized | None:
        node = value.producer()
        if node is None or node.domain not in ("", "ai.onnx"):
            return None
        if node.op_type == "DequantizeLinear":
            fmt = format_of(node)
            if fmt is None:
                return None
            record(data_input(node), fmt.scale, fmt.zero_point)
            return Quantized(data_input(node), fmt)
        if node.op_type == "Concat":
            return self._concat(node)
        move = _MOVES.get(node.op_type)
        x = self.of(input_of(node, 0)) if move is not None else None
        if move is None or x is None:
            return None
        moved = move(self._builder, node, x)
        if moved is None:
            return None
        for output, tensor in zip(node.outputs, moved, strict=True):
            self._known[output] = Quantized(tensor, x.format)
        return self._known[value]

    def _concat(self, node: ir.Node) -> Quantized | None:
        parts = [self.of(value) for value in node.inputs]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts) or any(part.format != known[0].format for part in known):
            return None
        tensors = [part.value for part in known]
        attributes: dict[str, Attribute] = {"axis": integer(node, "axis")}
        joined = self._builder.standard("Concat", tensors, f"{node.outputs[0].name}.q", attributes)[0]
        return Quantized(joined, known[0].format)


def clip(builder: Builder, value: ir.Value, clamp: tuple[int, int], hint: str) -> ir.Value:
    assert value.dtype is not None
    bounds = [builder.constant(np.array(bound, value.dtype.numpy()), f"{hint}.bound") for bound in clamp]
    return builder.standard("Clip", [value, *bounds], hint)[0]


def concat(builder: Builder, forms: Forms, node: ir.Node, out: Output) -> ir.Value | None:
    """Concat of tensors in different formats: each is brought to the output's first."""
    parts: list[ir.Value] = []
    for index, value in enumerate(node.inputs):
        name = f"{out.name}.in{index}"
        form = forms.of(value)
        array = const_of(value)
        if form is not None:
            parts.append(forms.convert(form, Output(out.format, out.clamp, form.shape, name)))
        elif array is not None:
            q = np.clip(out.format.quantize(array), *out.clamp).astype(out.format.dtype.numpy())
            parts.append(builder.constant(q, name))
        else:
            return None
    attributes: dict[str, Attribute] = {"axis": integer(node, "axis")}
    return builder.standard("Concat", parts, out.name, attributes)[0]


def arg_max(builder: Builder, forms: Forms, node: ir.Node) -> ir.Value | None:
    """ArgMax of dequantized integers is ArgMax of the integers, ties included."""
    x = forms.of(data_input(node))
    return builder.standard(node.op_type, [x.value], f"{node.outputs[0].name}.q", _attributes(node))[0] if x else None


def _attributes(node: ir.Node) -> dict[str, Attribute]:
    return {name: attribute.value for name, attribute in node.attributes.items()}


def _name(node: ir.Node) -> str:
    return f"{node.outputs[0].name}.q"


def _same(builder: Builder, node: ir.Node, x: Quantized) -> list[ir.Value] | None:
    if any(value is not None and const_of(value) is None for value in node.inputs[1:]) and node.op_type != "Gather":
        return None
    if node.op_type == "Transpose":
        return [builder.transpose(x.value, ints(node, "perm", tuple(reversed(range(len(x.shape))))), _name(node))]
    inputs = [x.value, *node.inputs[1:]]
    return builder.standard(node.op_type, inputs, _name(node), _attributes(node), outputs=len(node.outputs))


def _reshape(builder: Builder, node: ir.Node, x: Quantized) -> list[ir.Value]:
    return [builder.reshape(x.value, shape_of(node.outputs[0]), _name(node))]


def _depth_to_space(builder: Builder, node: ir.Node, x: Quantized) -> list[ir.Value]:
    """DepthToSpace as Reshape, Transpose, Reshape, which the layout passes can follow."""
    size, name = integer(node, "blocksize"), _name(node)
    batch, channels, height, width = x.shape
    depth = channels // (size * size)
    if string(node, "mode", "DCR") == "DCR":
        split, perm = (batch, size, size, depth, height, width), (0, 3, 4, 1, 5, 2)
    else:
        split, perm = (batch, depth, size, size, height, width), (0, 1, 4, 2, 5, 3)
    moved = builder.transpose(builder.reshape(x.value, split, f"{name}.split"), perm, f"{name}.moved")
    return [builder.reshape(moved, shape_of(node.outputs[0]), name)]


def _space_to_depth(builder: Builder, node: ir.Node, x: Quantized) -> list[ir.Value]:
    size, name = integer(node, "blocksize"), _name(node)
    batch, channels, height, width = x.shape
    split = (batch, channels, height // size, size, width // size, size)
    moved = builder.transpose(builder.reshape(x.value, split, f"{name}.split"), (0, 3, 5, 1, 2, 4), f"{name}.moved")
    return [builder.reshape(moved, shape_of(node.outputs[0]), name)]


def _identity(builder: Builder, node: ir.Node, x: Quantized) -> list[ir.Value] | None:
    """Identity, and Dropout whose mask nobody reads."""
    assert builder.graph is node.graph
    return [x.value] if len(node.outputs) == 1 else None


def _pad(builder: Builder, node: ir.Node, x: Quantized) -> list[ir.Value] | None:
    """The padding value must be one of the format's numbers, as 0 always is."""
    if const_of(input_of(node, 1)) is None:
        return None
    inputs = [x.value, *node.inputs[1:]]
    if string(node, "mode", "constant") == "constant":
        given = input_of(node, 2)
        real = const_of(given) if given is not None else np.zeros((), np.float32)
        if real is None:
            return None
        q = x.format.quantize(real.reshape(()))
        if x.format.dequantize(q) != real.reshape(()):
            return None
        inputs = [x.value, node.inputs[1], builder.constant(q, f"{_name(node)}.fill"), *node.inputs[3:]]
    return builder.standard("Pad", inputs, _name(node), _attributes(node))


def _max_pool(builder: Builder, node: ir.Node, x: Quantized) -> list[ir.Value] | None:
    return [out] if (out := max_pool(builder, node, x, x.format.limits, _name(node))) is not None else None


def max_pool(builder: Builder, node: ir.Node, x: Quantized, clamp: tuple[int, int], name: str) -> ir.Value | None:
    """MaxPool and GlobalMaxPool of 1-D and 2-D maps, without the indices output."""
    shape = shape_of(node.outputs[0])
    spatial = len(shape) - 2
    if spatial not in (1, 2) or len(node.outputs) > 1:
        return None
    ones = (1,) * spatial
    kernel = ints(node, "kernel_shape", x.shape[2:])
    strides, dilations = ints(node, "strides", ones), ints(node, "dilations", ones)
    pads = window_pads(node, x.shape[2:], shape[2:], kernel, strides, dilations)
    op = ops.QMaxPool(
        rows_and_columns(kernel, 1),
        rows_and_columns(needed_strides(strides, shape[2:]), 1),
        four_pads(pads),
        rows_and_columns(dilations, 1),
        *clamp,
    )
    return builder.spatial(
        Output(x.format, clamp, shape, name),
        lambda out: builder.operator(op, [builder.feature_map(x.value, name)], out.shape, out.format.dtype, out.name),
    )


def _resize_nearest(builder: Builder, node: ir.Node, x: Quantized) -> list[ir.Value] | None:
    if string(node, "mode", "nearest") != "nearest" or not is_plain_resize(node):
        return None
    shape, name = shape_of(node.outputs[0]), _name(node)
    tables = [
        builder.constant(nearest_table(node, size, out, scale), f"{name}.index")
        for size, out, scale in zip(x.shape[2:], shape[2:], spatial_scales(node), strict=True)
    ]
    return [
        builder.spatial(
            Output(x.format, x.format.limits, shape, name),
            lambda out: builder.operator(
                ops.QResizeNearest(),
                [builder.feature_map(x.value, name), *tables],
                out.shape,
                out.format.dtype,
                out.name,
            ),
        )
    ]


_Move = Callable[[Builder, ir.Node, Quantized], list[ir.Value] | None]
_MOVES: Mapping[str, _Move] = {
    **dict.fromkeys(_RESHAPES, _reshape),
    **dict.fromkeys(_SAME_INPUTS, _same),
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
    "Identity": _identity,
    "Dropout": _identity,
    "Pad": _pad,
    "MaxPool": _max_pool,
    "GlobalMaxPool": _max_pool,
    "Resize": _resize_nearest,
}

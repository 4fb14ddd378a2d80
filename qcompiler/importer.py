"""Read an ONNX file and bring it to the one form every later stage assumes.

`import_onnx` accepts what exporters write (opsets 7 to current, float, QDQ and QLinear forms, old IR versions, Constant
nodes, float16 weights, symbolic batch) and promises: opset 21, no com.microsoft operators, static shapes, every node
and value named, constants as initializers, finite weights.
"""

import difflib
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx.shape_inference
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import onnxscript.optimizer

from qcompiler import graph as g
from qcompiler.errors import QCompilerError
from qcompiler.onnx_file import KNOWN_DOMAINS, MICROSOFT_OPS, OPSET, one_line, read_model
from qcompiler.opset import to_opset, without_inferred_shapes
from qcompiler.passes.rewrite_fused_ops import RewriteFusedOps
from qcompiler.passes.rewrite_integer_ops import RewriteIntegerOps
from qcompiler.passes.rewrite_matmul_nbits import RewriteMatMulNBits
from qcompiler.passes.rewrite_qlinear import RewriteQLinear

__all__ = ["KNOWN_DOMAINS", "MICROSOFT_OPS", "OPSET", "import_onnx"]

IR_VERSION = 10

logger = logging.getLogger(__name__)


def import_onnx(path: Path, input_shapes: Mapping[str, tuple[int, ...]] | None = None) -> ir.Model:
    """Import a model.

    Args:
        path: the .onnx file. External weights must lie in its folder or below.
        input_shapes: full shapes of inputs with symbolic dimensions. A batch dimension that alone is unknown becomes 1.

    Returns:
        A float or QDQ model with the guarantees of this module's docstring.

    Raises:
        QCompilerError: anything wrong with the file or the shapes, an operator nobody knows, or a shape that depends
            on data.
    """
    proto = read_model(path)
    proto.ir_version = IR_VERSION
    _drop_initializer_inputs(proto.graph)
    _fix_input_shapes(proto, path, input_shapes or {})
    model = to_opset(proto, path)
    _half_to_float(model)
    _constants_to_initializers(model)
    _check_finite(model, path)
    _name_everything(model)
    for rewrite in (RewriteQLinear(), RewriteIntegerOps(), RewriteFusedOps(), RewriteMatMulNBits()):
        rewrite(model)
    _fold_shape_computations(model)
    model = _infer_shapes(model, path)
    _check_static(model, path)
    return model


def _drop_initializer_inputs(graph: onnx.GraphProto) -> None:
    """Before IR version 4 every initializer was listed among the inputs too."""
    constants = {tensor.name for tensor in graph.initializer}
    kept = [value for value in graph.input if value.name not in constants]
    del graph.input[:]
    graph.input.extend(kept)


# --- input shapes ------------------------------------------------------------------------------------------

_BATCH_NAME = re.compile(r"n|b|bs|\W*|none|unk__\d+|dynamic_axes_\d+|.*batch.*", re.IGNORECASE)

Dim = int | str
"""A known size, or the name of an unknown one ("?" if it has none)."""


def _fix_input_shapes(proto: onnx.ModelProto, path: Path, wanted: Mapping[str, tuple[int, ...]]) -> None:
    inputs = {value.name: value for value in proto.graph.input}
    for name, shape in wanted.items():
        if name not in inputs:
            close = difflib.get_close_matches(name, inputs, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise QCompilerError(f"{path} has no input {name!r}{hint} (inputs: {', '.join(inputs)})")
        _check_wanted_shape(path, name, _dims(inputs[name]), shape)
    # One symbol names one size, in whichever input it occurs.
    known = {
        dim: size
        for name, shape in wanted.items()
        for dim, size in zip(_dims(inputs[name]) or (), shape, strict=False)
        if isinstance(dim, str) and dim != "?"
    }
    for name, value in inputs.items():
        shape = wanted.get(name) or _resolve(path, name, _dims(value), known)
        dims = value.type.tensor_type.shape.dim
        del dims[:]
        value.type.tensor_type.shape.SetInParent()
        for size in shape:
            dims.add().dim_value = size


def _dims(value: onnx.ValueInfoProto) -> tuple[Dim, ...] | None:
    """Sizes of an input, or None if even its rank is unknown."""
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    return tuple(
        dim.dim_value if dim.HasField("dim_value") and dim.dim_value >= 0 else dim.dim_param or "?"
        for dim in tensor.shape.dim
    )


def _shown(dims: tuple[Dim, ...]) -> str:
    return str(list(dims))


def _check_wanted_shape(path: Path, name: str, dims: tuple[Dim, ...] | None, shape: tuple[int, ...]) -> None:
    given = f"{path}: --input-shape {name}={','.join(map(str, shape))}"
    if any(size <= 0 for size in shape):
        raise QCompilerError(f"{given} has a size that is not positive")
    if dims is None:
        return
    if len(dims) != len(shape):
        raise QCompilerError(f"{given} has {len(shape)} dimensions, but the input is {_shown(dims)}")
    for index, (dim, size) in enumerate(zip(dims, shape, strict=True)):
        if isinstance(dim, int) and dim != size:
            raise QCompilerError(
                f"{given} changes dimension {index}, which the model fixes at {dim} ({_shown(dims)}); "
                "export the model with that size"
            )


def _resolve(path: Path, name: str, dims: tuple[Dim, ...] | None, known: Mapping[str, int]) -> tuple[int, ...]:
    if dims is None:
        raise QCompilerError(f"{path}: the input {name!r} has no shape; give --input-shape {name}=1,…")
    shape = [known.get(dim, dim) if isinstance(dim, str) else dim for dim in dims]
    if shape and isinstance(shape[0], str) and _BATCH_NAME.fullmatch(shape[0]):
        if all(isinstance(size, int) for size in shape[1:]):
            logger.warning("%s: the batch dimension of input %r is symbolic; compiled for batch 1", path, name)
        shape[0] = 1
    sizes = tuple(size for size in shape if isinstance(size, int))
    if len(sizes) < len(shape):
        guess = 224 if len(shape) == 4 else 128
        example = ",".join(str(size if isinstance(size, int) else guess) for size in shape)
        raise QCompilerError(
            f"{path}: the input {name!r} has shape {_shown(dims)}, and a compiled model needs every size; "
            f"give them, for example --input-shape {name}={example}"
        )
    if 0 in sizes:
        raise QCompilerError(
            f"{path}: the input {name!r} has shape {_shown(dims)}: a size is zero, so it holds nothing"
        )
    return sizes


# --- normal form -------------------------------------------------------------------------------------------

_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype", "stash_type")


def _half_to_float(model: ir.Model) -> None:
    """Make float16 and bfloat16 models float32, inputs and outputs included."""
    changed = False
    for graph in model.graphs():
        nodes = tuple(graph)
        values = (*graph.inputs, *graph.initializers.values(), *(out for node in nodes for out in node.outputs))
        for value in values:
            tensor = value.const_value
            if tensor is not None and tensor.dtype in _HALF:
                value.const_value = ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name)
                changed = True
            if value.dtype in _HALF:
                value.dtype = ir.DataType.FLOAT
                changed = True
        for node in nodes:
            for name, attribute in tuple(node.attributes.items()):
                if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype in _HALF:
                    array = attribute.as_tensor().numpy().astype(np.float32)
                    node.attributes[name] = ir.AttrTensor(name, ir.tensor(array))
                elif name in _TYPE_ATTRIBUTES and attribute.value in [half.value for half in _HALF]:
                    node.attributes[name] = ir.AttrInt64(name, ir.DataType.FLOAT.value)
    if changed:
        logger.warning("the model is in half precision; it is compiled in float32, its inputs and outputs too")


def _constants_to_initializers(model: ir.Model) -> None:
    common_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            assert tensor is not None
            # A protobuf tensor decodes its bytes at every access.
            value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=value.name)
            value.shape, value.type = ir.Shape(tensor.shape.numpy()), ir.TensorType(tensor.dtype)


_INFINITY_READERS = ("Where", "Clip", "Max", "Min", "Pad", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual")
"""Operators for which an infinite constant is a bound or a mask rather than a broken weight."""


def _check_finite(model: ir.Model, path: Path) -> None:
    for graph in model.graphs():
        for value in graph.initializers.values():
            array = g.const_of(value)
            if array is None or array.dtype.kind != "f" or np.isfinite(array).all():
                continue
            nans, infinities = int(np.isnan(array).sum()), int(np.isinf(array).sum())
            readers = g.users(value)
            if nans or not all(g.is_op(reader, *_INFINITY_READERS) for reader in readers):
                used = ", ".join(f"{reader.name or reader.outputs[0].name} ({reader.op_type})" for reader in readers)
                raise QCompilerError(
                    f"{path}: the weights {value.name!r} of {used or 'no node'} hold {nans} NaN and {infinities} "
                    f"infinite values out of {array.size}; train or export the model again"
                )


class _Names:
    """An unnamed node goes by the value it makes."""

    def generate_node_name(self, node: ir.Node) -> str:
        return node.name or (node.outputs[0].name if node.outputs else None) or node.op_type

    def generate_value_name(self, value: ir.Value) -> str:
        producer = value.producer()
        return value.name or (f"{producer.op_type}_output" if producer is not None else "value")


def _name_everything(model: ir.Model) -> None:
    common_passes.NameFixPass(_Names())(model)


def _should_fold(node: ir.Node) -> bool | None:
    """Compute every constant but quantized weights, which must stay quantized."""
    if g.is_op(node, "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"):
        return False
    return True if g.is_op(node, "ConstantOfShape") else None


def _fold_shape_computations(model: ir.Model) -> None:
    """Turn Shape → Gather → Concat and the like into constants, without which Reshape and Pad have no static shape."""
    onnxscript.optimizer.fold_constants(
        model, onnx_shape_inference=True, should_fold=_should_fold, output_size_limit=1 << 26, input_size_limit=1 << 26
    )
    common_passes.RemoveUnusedNodesPass()(model)
    _constants_to_initializers(model)
    _name_everything(model)


def _infer_shapes(model: ir.Model, path: Path) -> ir.Model:
    proto = without_inferred_shapes(ir.to_proto(model))
    try:
        inferred = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError) as error:
        raise QCompilerError(f"{path}: its shapes do not fit together: {one_line(error)}") from None
    result = ir.from_proto(inferred)
    _constants_to_initializers(result)
    return result


def _check_static(model: ir.Model, path: Path) -> None:
    for node in model.graph:
        for value in node.outputs:
            unused = not value.uses() and not value.is_graph_output()
            if unused and not value.name:
                continue
            if value.shape is None or value.dtype is None or not all(isinstance(dim, int) for dim in value.shape):
                shape = "no known shape" if value.shape is None else f"the shape {value.shape}"
                raise QCompilerError(
                    f"{path}: node {node.name!r} ({node.op_type}) makes {value.name!r} with {shape}; its size depends "
                    "on the data, and only static shapes can be compiled. Cut the model before it"
                )
            if math.prod(g.shape_of(value)) == 0 and not unused:
                raise QCompilerError(
                    f"{path}: node {node.name!r} ({node.op_type}) makes {value.name!r} with the shape "
                    f"{list(g.shape_of(value))}, which holds nothing"
                )

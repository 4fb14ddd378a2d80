"""Read an ONNX file and bring it to the one form every later stage assumes.

`import_onnx` accepts what exporters write (opsets 7 to current, float, QDQ and QLinear forms, old IR versions, Constant
nodes, float16 weights, symbolic batch) and promises: opset 21, no com.microsoft operators, static shapes, every node
and value named, constants as initializers, finite weights.
"""

import difflib
import logging
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PureWindowsPath

import numpy as np
import onnx
import onnx.inliner
import onnx.shape_inference
import onnx.version_converter
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import onnxscript.optimizer
import onnxscript.version_converter
from google.protobuf.message import DecodeError

from qcompiler import graph as g
from qcompiler.errors import QCompilerError
from qcompiler.passes import rewrite_fused_ops, rewrite_qlinear
from qcompiler.passes.rewrite_fused_ops import RewriteFusedOps
from qcompiler.passes.rewrite_integer_ops import RewriteIntegerOps
from qcompiler.passes.rewrite_qlinear import MICROSOFT, RewriteQLinear

OPSET = 21
IR_VERSION = 10
OLDEST_OPSET = 7

MICROSOFT_OPS: tuple[str, ...] = (
    *(op_type for domain, op_type, _ in rewrite_qlinear.REWRITES if domain == MICROSOFT),
    *(op_type for op_type, _ in rewrite_fused_ops.REWRITES),
)
"""The com.microsoft operators that are rewritten as standard ones."""

KNOWN_DOMAINS: tuple[str, ...] = (*sorted({schema.domain for schema in onnx.defs.get_all_schemas()}), MICROSOFT)

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
    proto = _read(path)
    _load_external_data(proto, path)
    _check_operators(proto, path)
    _check(proto, path)
    _drop_initializer_inputs(proto.graph)
    _fix_input_shapes(proto, path, input_shapes or {})
    model = ir.from_proto(_to_opset(_without_inferred_shapes(proto), path))
    model = onnxscript.version_converter.ConvertVersionPass(OPSET)(model).model
    model.ir_version = IR_VERSION
    _half_to_float(model)
    _constants_to_initializers(model)
    _check_finite(model, path)
    _name_everything(model)
    for rewrite in (RewriteQLinear(), RewriteIntegerOps(), RewriteFusedOps()):
        rewrite(model)
    _fold_shape_computations(model)
    model = _infer_shapes(model, path)
    _check_static(model, path)
    return model


# --- reading ---------------------------------------------------------------------------------------------

_SIGNATURES: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\x89PNG", "a PNG image"),
    (0, b"\xff\xd8\xff", "a JPEG image"),
    (4, b"TFL3", "a TensorFlow Lite model; convert it with tf2onnx"),
    (0, b"PK\x03\x04", "a zip archive (a PyTorch checkpoint or .npz?); export the model with torch.onnx.export"),
    (0, b"\x80\x02", "a Python pickle (a PyTorch checkpoint?); export the model with torch.onnx.export"),
    (0, b"\x89HDF", "an HDF5 file (a Keras model?); convert it with tf2onnx"),
    (0, b"\x93NUMPY", "a numpy array"),
    (0, b"\x7fELF", "an executable"),
    (0, b"version https://git-lfs", "a Git LFS pointer; fetch the real file with git lfs pull"),
)


def _read(path: Path) -> onnx.ModelProto:
    if path.is_dir():
        raise QCompilerError(f"{path} is a folder; give the .onnx file in it")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise QCompilerError(f"{path} does not exist; give the path of an ONNX model{_nearby(path)}") from None
    except OSError as error:
        raise QCompilerError(f"{path} cannot be read: {error.strerror}") from None
    if not data:
        raise QCompilerError(f"{path} is empty; give an ONNX model")
    for offset, signature, kind in _SIGNATURES:
        if data[offset : offset + len(signature)] == signature:
            raise QCompilerError(f"{path} is not an ONNX model but {kind}")
    try:
        proto = onnx.ModelProto.FromString(data)
    except DecodeError:
        raise QCompilerError(
            f"{path} is not an ONNX model, or it is truncated ({len(data)} bytes); fetch or export it again"
        ) from None
    if not proto.ir_version or not proto.HasField("graph"):
        raise QCompilerError(f"{path} is not an ONNX model: it has no graph and no ONNX version")
    if not proto.graph.node:
        raise QCompilerError(f"{path} holds an empty graph: there is nothing to compile")
    return proto


def _nearby(path: Path) -> str:
    folder = path.parent
    names = [found.name for found in folder.glob("*.onnx")] if folder.is_dir() else []
    close = difflib.get_close_matches(path.name, names, 1)
    return f"; did you mean {folder / close[0]}?" if close else ""


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and all graphs inside its nodes' attributes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _graphs(inner)


def _tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    for graph in _graphs(proto.graph):
        yield from graph.initializer
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors


def _load_external_data(proto: onnx.ModelProto, path: Path) -> None:
    """Read weights kept in other files into the model, from the model's own folder only."""
    folder = path.parent
    external = [tensor for tensor in _tensors(proto) if tensor.data_location == onnx.TensorProto.EXTERNAL]
    for tensor in external:
        fields = {entry.key: entry.value for entry in tensor.external_data}
        _check_external_file(tensor.name, fields, folder, path)
    if external:
        try:
            onnx.load_external_data_for_model(proto, str(folder))
        except (onnx.checker.ValidationError, ValueError, OSError) as error:
            raise QCompilerError(f"{path}: the external weights cannot be read: {error}") from None


def _check_external_file(name: str, fields: Mapping[str, str], folder: Path, path: Path) -> None:
    location = fields.get("location", "")
    relative = Path(location)
    where = f"{path}: the weights {name!r} are kept in {location!r}"
    windows = PureWindowsPath(location)
    if not location or relative.is_absolute() or windows.drive or windows.root or ".." in windows.parts:
        raise QCompilerError(
            f"{where}, which is not inside the model's folder; save the model with its weights beside it"
        )
    file = folder / relative
    steps = [folder.joinpath(*relative.parts[: depth + 1]) for depth in range(len(relative.parts))]
    if any(step.is_symlink() for step in steps):
        raise QCompilerError(f"{where}, which is a symbolic link; replace it by the file itself")
    if not file.is_file():
        raise QCompilerError(f"{where}, but {file} does not exist; copy it beside the model")
    try:
        start = int(fields.get("offset", "0"))
        length = int(fields.get("length", "0"))
    except ValueError:
        raise QCompilerError(f"{where} at an offset or length that is not a number; export the model again") from None
    size = file.stat().st_size
    if start < 0 or length < 0 or start + length > size:
        raise QCompilerError(
            f"{where} at bytes {start} to {start + length}, but that file has {size} bytes; it is truncated"
        )


# --- checks on the file ------------------------------------------------------------------------------------


def _check_operators(proto: onnx.ModelProto, path: Path) -> None:
    """One error for every operator that neither ONNX nor our rewrites know, before any work is done."""
    opsets = {"" if entry.domain == "ai.onnx" else entry.domain: entry.version for entry in proto.opset_import}
    newest = onnx.defs.onnx_opset_version()
    opset = opsets.get("", newest)
    if not OLDEST_OPSET <= opset <= newest:
        raise QCompilerError(
            f"{path} uses ONNX opset {opset}; {OLDEST_OPSET} to {newest} can be read, so export it with one of these"
        )
    functions = {(function.domain, function.name) for function in proto.functions}
    unknown: dict[str, list[str]] = {}
    for graph in _graphs(proto.graph):
        for index, node in enumerate(graph.node):
            if (node.domain, node.op_type) not in functions:
                problem = _operator_problem(node, opsets)
                if problem:
                    label = node.name or f"node {index}" + (f" making {node.output[0]}" if node.output else "")
                    unknown.setdefault(problem, []).append(label)
    if unknown:
        listed = "; ".join(f"{problem} ({', '.join(names)})" for problem, names in unknown.items())
        raise QCompilerError(
            f"{path} has operators nobody here can run: {listed}. Export the model without them, "
            "or cut it before the first one"
        )


def _operator_problem(node: onnx.NodeProto, opsets: Mapping[str, int]) -> str | None:
    domain = "" if node.domain == "ai.onnx" else node.domain
    if domain == MICROSOFT:
        return None if node.op_type in MICROSOFT_OPS else f"{domain}.{node.op_type}"
    label = f"{domain}.{node.op_type}" if domain else node.op_type
    if domain not in KNOWN_DOMAINS:
        return f"{label} of a custom domain"
    version = opsets.get(domain, onnx.defs.onnx_opset_version())
    if not onnx.defs.has(node.op_type, domain):
        names = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == domain}
        close = difflib.get_close_matches(node.op_type, sorted(names), 1)
        return label + (f", did you mean {close[0]}?" if close else "")
    if not onnx.defs.has(node.op_type, version, domain):
        return f"{label}, which opset {version} does not have"
    return None


def _check(proto: onnx.ModelProto, path: Path) -> None:
    if proto.graph.sparse_initializer:
        raise QCompilerError(f"{path} has sparse weights, which are not supported; export it with dense ones")
    if not any(entry.domain in ("", "ai.onnx") for entry in proto.opset_import):
        proto.opset_import.append(onnx.helper.make_opsetid("", OPSET))
    try:
        onnx.checker.check_model(proto)
    except (onnx.checker.ValidationError, ValueError) as error:
        raise QCompilerError(f"{path} is not a valid ONNX model: {_one_line(error)}") from None
    for value in proto.graph.input:
        kind = value.type.WhichOneof("value")
        if kind != "tensor_type" or value.type.tensor_type.elem_type == onnx.TensorProto.STRING:
            shown = "strings" if kind == "tensor_type" else f"a {(kind or 'nothing').removesuffix('_type')}"
            raise QCompilerError(
                f"{path}: the input {value.name!r} holds {shown}; only tensors of numbers can be compiled, "
                "so cut the model after this part"
            )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


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


# --- opset -------------------------------------------------------------------------------------------------


def _without_inferred_shapes(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Drop what the exporter noted of inner shapes: symbols and stale batch sizes contradict the fixed inputs."""
    for graph in _graphs(proto.graph):
        del graph.value_info[:]
        for value in graph.output:
            if value.type.HasField("tensor_type"):
                value.type.tensor_type.ClearField("shape")
        for node in graph.node:
            node.domain = "" if node.domain == "ai.onnx" else node.domain
    for entry in proto.opset_import:
        entry.domain = "" if entry.domain == "ai.onnx" else entry.domain
    return proto


def _to_opset(proto: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """Inline functions and bring the standard domain to opset 18..21; onnxscript's converter goes on from there."""
    try:
        if proto.functions:
            proto = onnx.inliner.inline_local_functions(proto, convert_version=True)
        opset = next(entry.version for entry in proto.opset_import if entry.domain == "")
        if opset > OPSET:
            return _downgrade(proto, path)
        if opset < 18:
            converted = onnx.version_converter.convert_version(proto, 18)
            if opset < 11:
                _restore_old_resize(converted)
            return converted
    except (RuntimeError, onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise QCompilerError(
            f"{path}: its opset cannot be brought to {OPSET}: {_one_line(error)}. Export it with opset 13 or newer"
        ) from None
    return proto


def _restore_old_resize(proto: onnx.ModelProto) -> None:
    """Upsample and the Resize of opset 10 scale coordinates from the corner and floor; onnx's converter forgets that."""
    for graph in _graphs(proto.graph):
        for node in graph.node:
            if node.op_type == "Resize" and node.domain == "":
                for name, value in (("coordinate_transformation_mode", "asymmetric"), ("nearest_mode", "floor")):
                    node.attribute.append(onnx.helper.make_attribute(name, value))


def _downgrade(proto: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """Newer opsets mostly add types: expand operators opset 21 lacks, and check that the rest reads the same there."""
    newer = {
        (node.domain, node.op_type)
        for graph in _graphs(proto.graph)
        for node in graph.node
        if node.domain == "" and not onnx.defs.has(node.op_type, OPSET, "")
    }
    if newer:
        proto = onnx.inliner.inline_selected_functions(
            onnx.shape_inference.infer_shapes(proto), sorted(newer), inline_schema_functions=True
        )
        proto = _without_inferred_shapes(proto)
    for graph in _graphs(proto.graph):
        for node in graph.node:
            if node.domain == "":
                _check_reads_the_same(node, path)
    for entry in proto.opset_import:
        if entry.domain == "":
            entry.version = OPSET
    return proto


def _check_reads_the_same(node: onnx.NodeProto, path: Path) -> None:
    problem = None
    if not onnx.defs.has(node.op_type, OPSET, ""):
        problem = "the operator is newer"
    else:
        old, new = (
            onnx.defs.get_schema(node.op_type, version, "") for version in (OPSET, onnx.defs.onnx_opset_version())
        )
        for attribute in [attribute for attribute in node.attribute if attribute.name not in old.attributes]:
            default = new.attributes[attribute.name].default_value
            if onnx.helper.get_attribute_value(attribute) != onnx.helper.get_attribute_value(default):
                problem = f"its attribute {attribute.name} is newer"
            node.attribute.remove(attribute)
        if len(node.input) > old.max_input:
            problem = "it has inputs that are newer"
    if problem:
        raise QCompilerError(
            f"{path}: node {node.name or node.output[0]!r} ({node.op_type}) cannot be expressed in opset {OPSET}: "
            f"{problem}; export the model with opset {OPSET}"
        )


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
            value.shape, value.type = ir.Shape(tensor.shape), ir.TensorType(tensor.dtype)


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
    proto = _without_inferred_shapes(ir.to_proto(model))
    try:
        inferred = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError) as error:
        raise QCompilerError(f"{path}: its shapes do not fit together: {_one_line(error)}") from None
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

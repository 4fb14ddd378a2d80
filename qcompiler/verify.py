"""What must hold of a model between any two passes; a violation is a bug of ours, never of the user."""

import onnx
import onnx.shape_inference
import onnx_ir as ir

from qcompiler import graph as g


class VerificationError(AssertionError):
    """A pass left a broken model; the message names the stage or pass and the node."""


def verify(model: ir.Model, stage: str) -> None:
    """Check structure: names, order, types and static shapes, and every node against its ONNX schema.

    Takes milliseconds, whatever the size of the weights. `stage` names the culprit in the error.

    Raises:
        VerificationError: naming `stage` and the node.
    """
    graph = model.graph
    known: set[ir.Value] = set(graph.inputs) | set(graph.initializers.values())
    names: set[str] = set()
    for value in known:
        _check_name(value, names, stage, "graph")
    for name, value in graph.initializers.items():
        _require(value.name == name and value.const_value is not None, stage, f"initializer {name!r} has no constant")
    node_names: set[str] = set()
    context = _checker_context(model)
    for node in graph:
        label = f"node {node.name!r} ({node.op_type})"
        _require(bool(node.name), stage, f"a {node.op_type} has no name")
        _require(node.name not in node_names, stage, f"{label}: another node has that name")
        node_names.add(node.name or "")
        for value in node.inputs:
            if value is not None and value not in known:
                problem = "it is made later" if value.producer() in set(graph) else "nothing in the graph makes it"
                raise VerificationError(f"after {stage}: {label} reads {value.name!r}, but {problem}")
        for value in node.outputs:
            if not value.name and not value.uses():  # an optional output left out
                continue
            _check_name(value, names, stage, label)
            _check_type(value, stage, label)
            known.add(value)
        _check_schema(node, context, stage, label)
    for value in graph.outputs:
        _require(value in known, stage, f"nothing makes the graph output {value.name!r}")
        _check_type(value, stage, "graph")


def verify_shapes(model: ir.Model, stage: str) -> None:
    """Check every recorded shape and dtype against ONNX's own inference, from the graph's inputs on.

    Operators of our own domain are taken at their word.

    Raises:
        VerificationError: naming `stage` and the value.
    """
    proto = ir.to_proto(model)
    recorded = {value.name: value for node in model.graph for value in node.outputs if value.name}
    opaque = {value.name for node in model.graph if node.domain == g.QCOMPILER_DOMAIN for value in node.outputs}
    kept = [info for info in proto.graph.value_info if info.name in opaque]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(kept)
    for info in proto.graph.output:  # once it has met an unknown operator, onnx reports no contradictions
        if info.name not in opaque:
            info.type.tensor_type.ClearField("shape")
    try:
        inferred = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        raise VerificationError(f"after {stage}: shapes do not fit together: {error}") from error
    for info in (*inferred.graph.value_info, *inferred.graph.output):
        value, tensor = recorded.get(info.name), info.type.tensor_type
        if value is None or not tensor.HasField("shape"):
            continue
        dims = tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim)
        shape = g.shape_of(value)
        fits = len(dims) == len(shape) and all(dim in (None, size) for dim, size in zip(dims, shape, strict=True))
        _require(fits, stage, f"{info.name!r} is recorded as {shape}, but is {dims}")
        assert value.dtype is not None
        _require(
            value.dtype.value == tensor.elem_type,
            stage,
            f"{info.name!r} is recorded as {value.dtype}, but is {ir.DataType(tensor.elem_type)}",
        )


def _require(condition: bool, stage: str, problem: str) -> None:
    if not condition:
        raise VerificationError(f"after {stage}: {problem}")


def _check_name(value: ir.Value, taken: set[str], stage: str, label: str) -> None:
    _require(bool(value.name), stage, f"{label} has an unnamed value")
    _require(value.name not in taken, stage, f"{label}: two values are named {value.name!r}")
    taken.add(value.name or "")


def _check_type(value: ir.Value, stage: str, label: str) -> None:
    _require(value.dtype is not None, stage, f"{label}: {value.name!r} has no type")
    static = value.shape is not None and all(isinstance(dim, int) for dim in value.shape)
    _require(static, stage, f"{label}: {value.name!r} has no static shape ({value.shape})")


def _checker_context(model: ir.Model) -> onnx.checker.C.CheckerContext:
    context = onnx.checker.C.CheckerContext()
    context.ir_version = model.ir_version
    context.opset_imports = dict(model.graph.opset_imports)
    return context


def _check_schema(node: ir.Node, context: onnx.checker.C.CheckerContext, stage: str, label: str) -> None:
    imported = node.domain in context.opset_imports
    _require(imported, stage, f"{label} is of the domain {node.domain!r}, which the model does not import")
    if any(attribute.type == ir.AttributeType.GRAPH for attribute in node.attributes.values()):
        return  # the checker would need the scope around the node
    try:
        onnx.checker.check_node(ir.to_proto(node), context)
    except onnx.checker.ValidationError as error:
        raise VerificationError(f"after {stage}: {label}: {error}") from error

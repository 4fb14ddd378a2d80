"""Bring a model of any opset to opset 21, and drop the shapes its exporter noted."""

from pathlib import Path

import onnx
import onnx.inliner
import onnx.shape_inference
import onnx.version_converter
import onnx_ir as ir
import onnxscript.version_converter

from qcompiler.errors import QCompilerError
from qcompiler.onnx_file import OPSET, graphs_of, one_line

_ADAPTERS_FROM = 18
"""onnx's converter is complete up to this opset, onnxscript's from it on."""


def to_opset(proto: onnx.ModelProto, path: Path) -> ir.Model:
    """Inline functions and convert to opset 21. Input shapes should be fixed before: some adapters need ranks.

    Raises:
        QCompilerError: an operator without an adapter, or newer than opset 21 and not expressible in it.
    """
    model = ir.from_proto(_upgrade(without_inferred_shapes(proto), path))
    return onnxscript.version_converter.ConvertVersionPass(OPSET)(model).model


def without_inferred_shapes(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Drop what the exporter noted of inner shapes: symbols and stale batch sizes contradict the fixed inputs."""
    for graph in graphs_of(proto.graph):
        del graph.value_info[:]
        for value in graph.output:
            if value.type.HasField("tensor_type"):
                value.type.tensor_type.ClearField("shape")
        for node in graph.node:
            node.domain = "" if node.domain == "ai.onnx" else node.domain
    for entry in proto.opset_import:
        entry.domain = "" if entry.domain == "ai.onnx" else entry.domain
    return proto


def _upgrade(proto: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """Inline functions and bring the standard domain to opset 18..21."""
    try:
        if proto.functions:
            proto = onnx.inliner.inline_local_functions(proto, convert_version=True)
        opset = next(entry.version for entry in proto.opset_import if entry.domain == "")
        if opset > OPSET:
            return _downgrade(proto, path)
        if opset < _ADAPTERS_FROM:
            converted = onnx.version_converter.convert_version(proto, _ADAPTERS_FROM)
            if opset < 11:
                _restore_old_resize(converted)
            return converted
    except (
        RuntimeError,
        onnx.version_converter.ConvertError,
        onnx.checker.ValidationError,
        onnx.shape_inference.InferenceError,
    ) as error:
        raise QCompilerError(
            f"{path}: its opset cannot be brought to {OPSET}: {one_line(error)}. Export it with opset 13 or newer"
        ) from None
    return proto


def _restore_old_resize(proto: onnx.ModelProto) -> None:
    """Upsample and the Resize of opset 10 scale from the corner and round down; onnx's converter forgets that."""
    for graph in graphs_of(proto.graph):
        for node in graph.node:
            if node.op_type == "Resize" and node.domain == "":
                for name, value in (("coordinate_transformation_mode", "asymmetric"), ("nearest_mode", "floor")):
                    node.attribute.append(onnx.helper.make_attribute(name, value))


def _downgrade(proto: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """Newer opsets mostly add types: expand operators opset 21 lacks, and check that the rest reads the same there."""
    newer = {
        (node.domain, node.op_type)
        for graph in graphs_of(proto.graph)
        for node in graph.node
        if node.domain == "" and not onnx.defs.has(node.op_type, OPSET, "")
    }
    if newer:
        proto = onnx.inliner.inline_selected_functions(
            onnx.shape_inference.infer_shapes(proto), sorted(newer), inline_schema_functions=True
        )
        proto = without_inferred_shapes(proto)
    for graph in graphs_of(proto.graph):
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

"""Read a model file as a checked protobuf: the right kind of file, weights at hand, every operator known.

The file is ONNX, or TFLite, which `tflite_file` turns into ONNX.
"""

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path, PureWindowsPath

import onnx
from google.protobuf.message import DecodeError

from qcompiler.errors import QCompilerError
from qcompiler.passes import rewrite_fused_ops, rewrite_matmul_nbits, rewrite_qlinear
from qcompiler.passes.rewrite_qlinear import MICROSOFT
from qcompiler.tflite_file import is_tflite, read_tflite

OPSET = 21
OLDEST_OPSET = 7

MICROSOFT_OPS: tuple[str, ...] = (
    *(op_type for domain, op_type, _ in rewrite_qlinear.REWRITES if domain == MICROSOFT),
    *(op_type for op_type, _ in rewrite_fused_ops.REWRITES),
    rewrite_matmul_nbits.OP_TYPE,
)
"""The com.microsoft operators that are rewritten as standard ones."""

KNOWN_DOMAINS: tuple[str, ...] = (*sorted({schema.domain for schema in onnx.defs.get_all_schemas()}), MICROSOFT)


def read_model(path: Path) -> onnx.ModelProto:
    """Read a model with its external weights and check it.

    Raises:
        QCompilerError: not an ONNX model, weights outside its folder, operators nobody knows (all of them in one
            error), or a model that breaks ONNX's rules.
    """
    proto = _read(path)
    _load_external_data(proto, path)
    _check_operators(proto, path)
    _check(proto, path)
    return proto


def for_onnxruntime(path: Path) -> Path | bytes:
    """What onnxruntime loads for a model file: the file itself, or the ONNX model that a TFLite one is read as."""
    data = path.read_bytes()
    return read_tflite(data, path).SerializeToString() if is_tflite(data) else path


def external_files(path: Path) -> tuple[Path, ...]:
    """The files beside a model that hold weights of it, each once, by name."""
    if is_tflite(path.read_bytes()):
        return ()
    proto = onnx.load(path, load_external_data=False)
    external = (tensor for tensor in _tensors(proto) if tensor.data_location == onnx.TensorProto.EXTERNAL)
    names = {entry.value for tensor in external for entry in tensor.external_data if entry.key == "location"}
    return tuple(path.parent / name for name in sorted(names))


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


# --- reading ---------------------------------------------------------------------------------------------

_SIGNATURES: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\x89PNG", "a PNG image"),
    (0, b"\xff\xd8\xff", "a JPEG image"),
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
    if is_tflite(data):
        return read_tflite(data, path)
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


def graphs_of(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and all graphs inside its nodes' attributes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from graphs_of(inner)


def _tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    for graph in graphs_of(proto.graph):
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
    for graph in graphs_of(proto.graph):
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
    # The checker insists on shapes of inputs and outputs, which onnxruntime does not, and neither do we.
    bare = [
        value.type.tensor_type
        for value in (*proto.graph.input, *proto.graph.output)
        if value.type.HasField("tensor_type") and not value.type.tensor_type.HasField("shape")
    ]
    for tensor_type in bare:
        tensor_type.shape.SetInParent()
    try:
        onnx.checker.check_model(proto)
    except (onnx.checker.ValidationError, ValueError) as error:
        raise QCompilerError(f"{path} is not a valid ONNX model: {one_line(error)}") from None
    for tensor_type in bare:
        tensor_type.ClearField("shape")
    for value in proto.graph.input:
        if (shown := _no_numbers(value)) is not None:
            raise QCompilerError(
                f"{path}: the input {value.name!r} holds {shown}; only tensors of numbers can be compiled, "
                "so cut the model after this part"
            )
    for value in proto.graph.output:
        if value.type.WhichOneof("value") is not None and (shown := _no_numbers(value)) is not None:
            raise QCompilerError(
                f"{path}: the output {value.name!r} holds {shown}; only tensors of numbers can be compiled, "
                "so cut the model before this part"
            )


def _no_numbers(value: onnx.ValueInfoProto) -> str | None:
    """What an input or output holds, if it is not a tensor of numbers."""
    kind = value.type.WhichOneof("value")
    if kind == "tensor_type":
        return "strings" if value.type.tensor_type.elem_type == onnx.TensorProto.STRING else None
    return "nothing" if kind is None else f"{'an' if kind[0] in 'aeiou' else 'a'} {kind.removesuffix('_type')}"

"""The bundle `MODEL.qc/`: everything needed to run a compiled model, and to see what was done to it.

====================  ==========================================================================================
manifest.json         versions, target, hashes of all other files, inputs and outputs
model.so              the code; weights.safetensors: its constants
model.qdq.onnx        the quantized model as standard ONNX, which any runtime can load
model.int.onnx        the integer graph that was lowered (`qcompiler.integer.ops`)
target.json           the target spec with inheritance resolved and units parsed
gpu_0.cl, gpu_0.txt…  the kernels of a GPU's region (.cu with CUDA), and their launches, to read; the code holds both
report.json           `qcompiler.report.Report`; report.txt: the same as tables; report.html: and as pictures
====================  ==========================================================================================

Equal inputs give byte-identical bundles. Loading one needs neither the compiler half of TVM nor onnx.
"""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
from pydantic import TypeAdapter, ValidationError

from qcompiler.errors import QCompilerError

if TYPE_CHECKING:
    import onnx_ir as ir

    from qcompiler.backends.relax import Lowered
    from qcompiler.report import Report
    from qcompiler.runtime import Executable
    from qcompiler.target import Host, Target

MAGIC = "qcompiler bundle"
FORMAT_VERSION = 1
MANIFEST, LIBRARY, WEIGHTS = "manifest.json", "model.so", "weights.safetensors"
QDQ_MODEL, INTEGER_MODEL, TARGET = "model.qdq.onnx", "model.int.onnx", "target.json"
REPORT_JSON, REPORT_TEXT, REPORT_PAGE = "report.json", "report.txt", "report.html"


@dataclass(frozen=True)
class Quantization:
    """How a float input or output is represented inside: real = (q - zero_point) * scale."""

    dtype: str
    scale: float
    zero_point: int


@dataclass(frozen=True)
class Tensor:
    """One input or output of the model, as `Bundle.run` takes and gives it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    quantization: Quantization | None
    """None if it is not quantized, or already integer."""


@dataclass(frozen=True)
class Cpu:
    """What the code needs of the CPU."""

    architecture: str
    """As in an LLVM triple: "x86_64", "aarch64"."""
    flags: tuple[str, ...]
    """Instruction set extensions it may use, by the names of /proc/cpuinfo."""


@dataclass(frozen=True)
class Manifest:
    magic: str
    format_version: int
    qcompiler: str
    tvm: str
    model: str
    model_sha256: str
    """Of the .onnx file; where weights lie in files beside it, of the hashes of all, in hexadecimal, one a line."""
    target: str
    target_sha256: str
    cpu: Cpu
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    files: Mapping[str, str]
    """SHA-256 by file name."""


_MANIFEST: TypeAdapter[Manifest] = TypeAdapter(Manifest)


# --- using --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bundle:
    """A compiled model on disk, checked against its manifest."""

    path: Path
    manifest: Manifest
    _keep: TemporaryDirectory[str] | None = field(default=None, repr=False)
    """The folder above, if it is to go when the bundle does."""
    _threads: int | None = None
    """To use of those it was compiled for; None for all."""

    @property
    def target(self) -> str:
        return self.manifest.target

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self.manifest.inputs

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        return self.manifest.outputs

    @cached_property
    def threads(self) -> int:
        """How many threads it was compiled for."""
        return json.loads((self.path / TARGET).read_text("utf-8"))["host"]["threads"]

    @cached_property
    def report(self) -> "Report":
        from qcompiler.report import Report

        return Report.from_dict(json.loads((self.path / REPORT_JSON).read_text("utf-8")))

    @cached_property
    def _executable(self) -> "Executable":
        from qcompiler.host_cpu import why_not_here
        from qcompiler.runtime import Executable

        # An instruction the CPU lacks would kill the process without a word.
        problem = why_not_here(self.manifest.cpu.architecture, self.manifest.cpu.flags)
        if problem is not None:
            raise QCompilerError(f"{self.path} cannot run here: {problem}. Compile the model again for this machine.")
        return Executable(self.path / LIBRARY, read_weights(self.path / WEIGHTS), self._threads or self.threads)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the model.

        Args:
            inputs: an array for each of `self.inputs`. Where the model's first dimension is 1, the first axis may
                hold any number of samples, the same for all inputs; they are run one after the other.

        Returns:
            An array for each of `self.outputs`. Several samples are concatenated along the first axis (stacked
            along a new one where an output's first dimension is not 1).

        Raises:
            QCompilerError: a name, shape or dtype that the model does not take.
        """
        arrays = self._checked(inputs)
        samples = self._sample_count(arrays)
        if samples is None:
            return self._run_once(arrays)
        runs = [
            self._run_once({name: array[index : index + 1] for name, array in arrays.items()})
            for index in range(samples)
        ]
        joined: dict[str, np.ndarray] = {}
        for tensor in self.outputs:
            parts = [run[tensor.name] for run in runs]
            joined[tensor.name] = np.concatenate(parts) if tensor.shape[:1] == (1,) else np.stack(parts)
        return joined

    def _run_once(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        # ascontiguousarray makes a vector of a scalar.
        given = [arrays[tensor.name] for tensor in self.inputs]
        ordered = [np.ascontiguousarray(array).reshape(array.shape) for array in given]
        outputs = self._executable.run(ordered)
        return {tensor.name: output for tensor, output in zip(self.outputs, outputs, strict=True)}

    def _checked(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The inputs in the model's dtypes, their names and the shapes of single samples verified."""
        known = [tensor.name for tensor in self.inputs]
        for name in inputs:
            if name not in known:
                near = get_close_matches(name, known, n=1, cutoff=0.4)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise QCompilerError(f"{self.path} has no input {name!r}; {hint}It takes {_listed(known)}.")
        missing = [name for name in known if name not in inputs]
        if missing:
            raise QCompilerError(f"{self.path} needs {_listed(known)}; {_listed(missing)} is not given.")
        return {tensor.name: self._converted(tensor, np.asarray(inputs[tensor.name])) for tensor in self.inputs}

    def _converted(self, tensor: Tensor, array: np.ndarray) -> np.ndarray:
        batched = tensor.shape[:1] == (1,)
        if array.shape[int(batched) :] != tensor.shape[int(batched) :] or array.ndim != len(tensor.shape):
            wanted = f"{_shape(tensor.shape)}{', or any number of samples in place of the first 1' if batched else ''}"
            raise QCompilerError(
                f"the input {tensor.name!r} of {self.path} has shape {_shape(array.shape)} "
                f"where the model takes {wanted}."
            )
        both_floats = array.dtype.kind == "f" and np.dtype(tensor.dtype).kind == "f"
        if not both_floats and not np.can_cast(array.dtype, tensor.dtype, "safe"):
            raise QCompilerError(
                f"the input {tensor.name!r} of {self.path} is {array.dtype}, which does not convert to the model's "
                f"{tensor.dtype} without loss; convert it with .astype({tensor.dtype!r}) if that is what you mean."
            )
        return array.astype(tensor.dtype, copy=False)

    def _sample_count(self, arrays: Mapping[str, np.ndarray]) -> int | None:
        """Samples to loop over, or None if the arrays are what one run takes."""
        if all(arrays[tensor.name].shape == tensor.shape for tensor in self.inputs):
            return None
        counts = {name: array.shape[0] for name, array in arrays.items() if array.ndim}
        if len(set(counts.values())) > 1 or any(tensor.shape[:1] != (1,) for tensor in self.inputs):
            shown = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise QCompilerError(f"the inputs of {self.path} hold different numbers of samples: {shown}.")
        count = next(iter(counts.values()))
        if count == 0:
            raise QCompilerError(f"the inputs of {self.path} hold no sample.")
        return count


def load(
    path: str | os.PathLike[str], keep: TemporaryDirectory[str] | None = None, *, threads: int | None = None
) -> Bundle:
    """Open a bundle, verifying that every file is the one that was written.

    Args:
        path: the folder MODEL.qc/.
        keep: a temporary folder around it, to be removed when nobody holds the bundle any more.
        threads: how many of the threads it was compiled for to use; all if not given. A process has one pool, as large
            as the greediest of its bundles asks.

    Raises:
        QCompilerError: it is not a bundle, of another format version, a file is missing or changed, or it was compiled
            for fewer threads.
    """
    folder = Path(path)
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise QCompilerError(f"{folder} {what}; a bundle is the folder MODEL.qc/ that qcompile writes.")
    manifest = _read_manifest(folder)
    for name, digest in manifest.files.items():
        file = folder / name
        if Path(name).name != name:
            raise QCompilerError(f"{folder / MANIFEST} names a file outside the bundle, {name!r}; do not use it.")
        if not file.is_file():
            raise QCompilerError(f"{file} is missing; the bundle is incomplete, compile the model again.")
        if sha256(file) != digest:
            raise QCompilerError(f"{file} is not the file that was compiled (its hash differs); compile again.")
    bundle = Bundle(folder, manifest, keep, threads)
    if threads is not None and threads > bundle.threads:
        raise QCompilerError(
            f"{folder} was compiled for {bundle.threads} thread{'s' * (bundle.threads > 1)} and cannot use {threads}; "
            f"compile the model again with --threads {threads}."
        )
    return bundle


def _read_manifest(folder: Path) -> Manifest:
    file = folder / MANIFEST
    try:
        data = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise QCompilerError(f"{folder} is not a bundle: it has no {MANIFEST}.") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise QCompilerError(f"{file} is damaged: it is not JSON. Compile the model again.") from None
    except OSError as error:
        raise QCompilerError(f"{file} cannot be read: {error.strerror}.") from None
    if not isinstance(data, dict) or data.get("magic") != MAGIC:
        raise QCompilerError(f"{folder} is not a bundle: its {MANIFEST} is not one that qcompile writes.")
    if data.get("format_version") != FORMAT_VERSION:
        raise QCompilerError(
            f"{folder} has bundle format {data.get('format_version')}, this version of qcompiler reads "
            f"{FORMAT_VERSION}; compile the model again."
        )
    try:
        return _MANIFEST.validate_python(data)
    except ValidationError as error:
        place = ".".join(str(step) for step in error.errors()[0]["loc"])
        raise QCompilerError(f"{file} is damaged at {place}; compile the model again.") from None


# --- writing ------------------------------------------------------------------------------------------------


@contextmanager
def staging(output: Path) -> Iterator[Path]:
    """A new empty folder that becomes `output` when the block ends well, and vanishes when it does not.

    A bundle standing at `output` is replaced, and stays as it is until then.

    Raises:
        QCompilerError: at once, if `output` holds something that is not a bundle or cannot be written.
    """
    output = output.resolve()
    _refuse_foreign(output)
    folder = output.parent / f".{output.name}.{secrets.token_hex(4)}"
    try:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
        except OSError as error:
            raise QCompilerError(f"cannot write {output}: {error.strerror} ({error.filename}).") from None
        yield folder
        _refuse_foreign(output)
        _move_in(folder, output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _refuse_foreign(output: Path) -> None:
    """Only nothing, an empty folder or a bundle may be overwritten."""
    if output.is_dir():
        if not any(output.iterdir()):
            return
        try:
            data = json.loads((output / MANIFEST).read_text("utf-8"))
        except (OSError, ValueError):
            data = None
        if not isinstance(data, dict) or data.get("magic") != MAGIC:
            raise QCompilerError(
                f"{output} already holds something that is not a bundle; it is left alone. Choose another --output."
            )
    elif output.exists():
        raise QCompilerError(f"{output} is a file, it is left alone. Choose another --output for the bundle.")


def _move_in(folder: Path, output: Path) -> None:
    """Put `folder` at `output`; what stood there comes back if that fails."""
    if not output.exists():
        os.replace(folder, output)
        return
    old = folder.with_name(folder.name + ".old")
    os.replace(output, old)
    try:
        os.replace(folder, output)
    except BaseException:
        os.replace(old, output)
        raise
    shutil.rmtree(old)


def write(
    folder: Path,
    source: Path,
    target: "Target",
    quantized: "ir.Model",
    integer: "ir.Model",
    lowered: "Lowered",
    report: "Report",
) -> None:
    """Write everything but the code, which `backends.relax.build` has put into `folder`, and seal it."""
    import onnx_ir as ir

    from qcompiler.report import as_text

    write_weights(folder / WEIGHTS, lowered.parameters)
    for document in lowered.documents:
        (folder / document.name).write_text(document.text, "utf-8", newline="\n")
    ir.save(quantized, folder / QDQ_MODEL)
    ir.save(integer, folder / INTEGER_MODEL)
    write_json(folder / TARGET, target.model_dump(mode="json"))
    write_json(folder / REPORT_JSON, report.to_dict())
    (folder / REPORT_TEXT).write_text(as_text(report), "utf-8", newline="\n")
    inputs = tuple(_tensor(value, _reader(value)) for value in integer.graph.inputs)
    outputs = tuple(_tensor(value, value.producer()) for value in integer.graph.outputs)
    write_manifest(folder, source, target.name, cpu_of(target.host), inputs, outputs)


def cpu_of(host: "Host") -> Cpu:
    """What code built for a host needs to run."""
    from qcompiler import host_cpu

    triple = host.tvm_target.get("mtriple")
    architecture = triple.split("-", maxsplit=1)[0] if isinstance(triple, str) else host_cpu.architecture()
    return Cpu(architecture, host_cpu.flags_of(host.features()))


def _reader(value: "ir.Value") -> "ir.Node | None":
    """The node that quantizes an input."""
    from qcompiler.graph import is_op, users

    return next((node for node in users(value) if is_op(node, "QuantizeLinear")), None)


def _tensor(value: "ir.Value", border: "ir.Node | None") -> Tensor:
    """Describe an input or output. border: the QuantizeLinear or DequantizeLinear beside it, if any."""
    from qcompiler.graph import const_of, data_input, dtype_of, input_of, is_op, shape_of, value_name

    quantization = None
    if border is not None and is_op(border, "QuantizeLinear", "DequantizeLinear"):
        scale, zero_point = const_of(data_input(border, 1)), const_of(input_of(border, 2))
        inside = border.outputs[0] if is_op(border, "QuantizeLinear") else data_input(border)
        if scale is not None and scale.size == 1:
            offset = 0 if zero_point is None else int(zero_point.item())
            quantization = Quantization(str(dtype_of(inside)), float(scale.item()), offset)
    return Tensor(value_name(value), shape_of(value), str(dtype_of(value)), quantization)


def write_weights(file: Path, arrays: Sequence[np.ndarray]) -> None:
    """Constants in order, as safetensors, whose bytes depend on nothing else."""
    from safetensors.numpy import save

    # Written here rather than by save_file, whose file only its owner can read.
    file.write_bytes(save({f"{index:06}": np.ascontiguousarray(array) for index, array in enumerate(arrays)}))


def read_weights(file: Path) -> list[np.ndarray]:
    from safetensors.numpy import load_file

    arrays = load_file(file)
    return [arrays[name] for name in sorted(arrays)]


def write_manifest(
    folder: Path,
    model: Path,
    target: str,
    cpu: Cpu,
    inputs: tuple[Tensor, ...],
    outputs: tuple[Tensor, ...],
) -> None:
    """Seal a folder: hash every file in it and write the manifest."""
    from importlib.metadata import version

    files = {file.name: sha256(file) for file in sorted(folder.iterdir()) if file.name != MANIFEST}
    manifest = Manifest(
        magic=MAGIC,
        format_version=FORMAT_VERSION,
        qcompiler=version("qcompiler"),
        tvm=version("apache-tvm"),
        model=model.name,
        model_sha256=_model_sha256(model),
        target=target,
        target_sha256=files[TARGET],
        cpu=cpu,
        inputs=inputs,
        outputs=outputs,
        files=files,
    )
    write_json(folder / MANIFEST, _MANIFEST.dump_python(manifest, mode="json"))


def write_json(file: Path, data: object) -> None:
    file.write_text(json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False) + "\n", "utf-8", newline="\n")


def _model_sha256(model: Path) -> str:
    from qcompiler.onnx_file import external_files

    digests = [sha256(file) for file in (model, *external_files(model))]
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(f"{digest}\n" for digest in digests).encode()).hexdigest()


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _listed(names: list[str]) -> str:
    return ", ".join(repr(name) for name in names)


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(str(dim) for dim in shape) or "()"

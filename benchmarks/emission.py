"""Emitted TFLite and TOSA against our own integer graph, and through Arm's Vela: every network of the model zoo.

    python benchmarks/emission.py [--only NAME] [--zoo DIR]

Networks are calibrated on their data and placed for arm-npu; each accelerator region is then run on real inputs (what
reaches it from samples of the data) and on random ones, by our numpy reference, by LiteRT's reference kernels and by
the TOSA reference model, and the results of all operators are compared. Vela compiles the TFLite of each region for
the accelerators below, the network placed for the target of that name. Float networks are then quantized once more,
with 16-bit activations, which are not written as TOSA.

Needs the extra `ethosu`, and tosa_reference_model of tosa-tools on PATH; without that its column stays empty. Exits
with 1 if an element differs or Vela leaves to the CPU what we placed on the accelerator.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Annotated

import numpy as np
import onnx_ir as ir
import onnxruntime
import typer
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from rich.console import Console

from qcompiler.compile import Placed, place, schedule
from qcompiler.costs import region_cost
from qcompiler.emit.regions import emit_regions, write_tflite, write_tosa
from qcompiler.errors import QCompilerError
from qcompiler.graph import const_of, dtype_of, shape_of, value_name
from qcompiler.integer.reference import Executor
from qcompiler.options import Options
from qcompiler.partition import Region
from qcompiler.quant.types import ActivationType, WeightRequest
from qcompiler.report import VelaReport

TARGET = "arm-npu"
ACCELERATORS = ("ethos-u55-128", "ethos-u85-256")
WIDTHS: tuple[ActivationType, ...] = ("int8", "int16")
CALIBRATION_SAMPLES, REAL, RANDOM = 16, 4, 4
RESULTS = Path(__file__).parent / "results" / "emission.md"
DEFAULT_ZOO = Path(os.environ.get("QCOMPILER_ZOO", Path(__file__).resolve().parents[2] / "shared" / "zoo"))

Arrays = Mapping[str, np.ndarray]


@dataclass
class Equality:
    """Elements compared and elements that differ."""

    compared: int = 0
    differing: int = 0

    def add(self, wanted: Sequence[np.ndarray], got: Sequence[np.ndarray]) -> None:
        for want, have in zip(wanted, got, strict=True):
            assert want.shape == have.shape and want.dtype == have.dtype
            self.compared += want.size
            self.differing += int((want != have).sum())

    def __str__(self) -> str:
        return f"{self.compared:,} / {self.differing}" if self.compared else "-"


@dataclass(frozen=True)
class Row:
    name: str
    operators: int
    tflite: Equality
    tosa: Equality
    vela: Mapping[str, tuple[VelaReport, ...]]

    @property
    def good(self) -> bool:
        on_cpu = sum(region.cpu_operators for regions in self.vela.values() for region in regions)
        return not (self.tflite.differing or self.tosa.differing or on_cpu)

    def cells(self) -> list[str]:
        shown = [self.name, str(self.operators), str(self.tflite), str(self.tosa)]
        for accelerator in ACCELERATORS:
            regions = self.vela[accelerator]
            shown.append(
                f"{sum(region.npu_operators for region in regions)} / {sum(region.cpu_operators for region in regions)}"
            )
            ours, vela = (sum(getattr(region, name) for region in regions) for name in ("cycles", "vela_cycles"))
            shown.append(f"{vela:,}")
            shown.append(f"{ours / vela:.2f}")
        return shown


def main(
    only: Annotated[str, typer.Option(help="networks whose name contains this")] = "",
    zoo: Annotated[Path, typer.Option(help="folder of models and data")] = DEFAULT_ZOO,
) -> None:
    """Compare every network; print a line each, and write the table if none was left out."""
    evaluation = _evaluation(zoo)
    console, tables = Console(), dict[ActivationType, list[Row]]()
    for activations in WIDTHS:
        rows = tables[activations] = []
        for entry in json.loads((zoo / "manifest.json").read_text())["models"]:
            widened = entry["kind"] == "fp32" or activations == "int8"
            if only in entry["name"] and (zoo / entry["model"]).is_file() and widened:
                rows.append(_measure(zoo, entry, evaluation, activations))
                console.print(" | ".join((activations, *rows[-1].cells())), highlight=False, soft_wrap=True)
    if not only:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(_markdown(tables))
    sys.exit(0 if all(row.good for rows in tables.values() for row in rows) else 1)


def _measure(zoo: Path, entry: Mapping[str, str], evaluation: ModuleType, activations: ActivationType) -> Row:
    path = zoo / entry["model"]
    samples = _samples(path, entry, evaluation)
    calibration = {name: np.concatenate([sample[name] for sample in samples]) for name in samples[0]}

    def placed_for(target: str) -> Placed:
        if entry["kind"] != "fp32":
            return place(path, target)
        return place(path, target, Options(calibration=calibration, formats=WeightRequest(activations=activations)))

    placed = placed_for(TARGET)
    regions = [region for region in placed.partition.regions if region.backend == "npu"]
    tflite, tosa = Equality(), Equality()
    with TemporaryDirectory() as folder:
        for region in regions:
            _compare(placed, region, samples, Path(folder), tflite, tosa)
        vela: dict[str, tuple[VelaReport, ...]] = {}
        for accelerator in ACCELERATORS:
            chip = placed_for(accelerator)
            costs = {name: region_cost(program, chip.target) for name, program in schedule(chip).items()}
            vela[accelerator] = emit_regions(chip.partition, costs, chip.target, "vela", Path(folder))
    return Row(entry["name"], sum(len(region.nodes) for region in regions), tflite, tosa, vela)


def _compare(
    placed: Placed, region: Region, samples: Sequence[Arrays], folder: Path, tflite: Equality, tosa: Equality
) -> None:
    # Every tensor between the operators becomes an output too: ten classes would hide much.
    region = replace(region, outputs=tuple(value for node in region.nodes for value in node.outputs))
    network = write_tflite(region, folder)
    wide = any(value.dtype == ir.DataType.INT16 for node in region.nodes for value in node.outputs)
    tosa_file = write_tosa(region, folder) if shutil.which("tosa_reference_model") and not wide else None
    executor, rng = Executor(placed.integer), np.random.default_rng(0)
    names = [value_name(value) for value in region.inputs]
    inputs: list[list[np.ndarray]] = []
    for sample in samples[:REAL]:
        found = executor.run(sample, [name for name in names if name not in sample])
        inputs.append([sample[name] if name in sample else found[name] for name in names])
    inputs += [[_random(value, rng) for value in region.inputs] for _ in range(RANDOM)]
    for arrays in inputs:
        wanted = _run_region(executor, region, arrays)
        tflite.add(wanted, _run_tflite(network, region, arrays))
        if tosa_file is not None:
            tosa.add(wanted, _run_tosa(tosa_file, region, arrays))


def _random(value: ir.Value, rng: np.random.Generator) -> np.ndarray:
    info = np.iinfo(dtype_of(value))
    return rng.integers(info.min, info.max + 1, shape_of(value)).astype(dtype_of(value))


def _run_region(executor: Executor, region: Region, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    values = dict(zip(region.inputs, arrays, strict=True))
    for node in region.nodes:
        inputs = [None if value is None else values.get(value, const_of(value)) for value in node.inputs]
        values.update(zip(node.outputs, executor.run_node(node, inputs), strict=True))
    return [values[value] for value in region.outputs]


def _run_tflite(network: Path, region: Region, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    interpreter = Interpreter(str(network), experimental_op_resolver_type=OpResolverType.BUILTIN_REF)
    interpreter.allocate_tensors()
    for detail, array in zip(interpreter.get_input_details(), arrays, strict=True):
        interpreter.set_tensor(detail["index"], array)
    interpreter.invoke()
    details = interpreter.get_output_details()
    assert len(details) == len(region.outputs)
    return [interpreter.get_tensor(detail["index"]) for detail in details]


def _run_tosa(file: Path, region: Region, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    for index, array in enumerate(arrays):
        np.save(file.parent / f"in{index}.npy", array.view(np.int8))
    inputs, outputs = range(len(arrays)), range(len(region.outputs))
    command = [
        "tosa_reference_model",
        f"--tosa_file={file.name}",
        f"--ifm_name={','.join(f'TosaInput_{index}' for index in inputs)}",
        f"--ifm_file={','.join(f'in{index}.npy' for index in inputs)}",
        f"--ofm_name={','.join(f'TosaOutput_{index}' for index in outputs)}",
        f"--ofm_file={','.join(f'out{index}.npy' for index in outputs)}",
        "--flatbuffer_dir=.",
        "--output_dir=.",
        "--tosa_level=NONE",
    ]
    done = subprocess.run(command, cwd=file.parent, capture_output=True, text=True, check=False)
    if done.returncode:
        raise QCompilerError(f"the TOSA reference model refuses {file.name}: {done.stdout}{done.stderr}")
    loaded = [np.load(file.parent / f"out{index}.npy") for index in outputs]
    return [array.view(dtype_of(value)) for array, value in zip(loaded, region.outputs, strict=True)]


def _evaluation(zoo: Path) -> ModuleType:
    """The zoo's own script, which knows every preprocessing."""
    path = zoo / "eval_ref.py"
    spec = importlib.util.spec_from_file_location("eval_ref", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise typer.BadParameter(f"{zoo} holds no eval_ref.py; set --zoo or QCOMPILER_ZOO to the model zoo")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _samples(path: Path, entry: Mapping[str, str], evaluation: ModuleType) -> list[Arrays]:
    """The first inputs that the evaluation feeds."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    fed: list[Arrays] = []

    def record(inputs: Arrays) -> list[np.ndarray]:
        fed.append(dict(inputs))
        return [np.asarray(output) for output in session.run(None, dict(inputs))]

    evaluation.evaluate(entry, record, CALIBRATION_SAMPLES)
    return fed


def _markdown(tables: Mapping[ActivationType, Sequence[Row]]) -> str:
    header = ["network", "operators", "LiteRT: elements / differing", "TOSA: elements / differing"]
    for accelerator in ACCELERATORS:
        header += [f"{accelerator}: NPU / CPU", "Vela's cycles", "ours / Vela's"]

    def table(rows: Sequence[Row]) -> str:
        lines = [header, ["---"] * len(header), *(row.cells() for row in rows)]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)

    return f"""# Emission: TFLite, TOSA and Vela

    python benchmarks/emission.py

Accelerator regions of the zoo's networks for {TARGET}: the results of every operator in LiteRT's reference kernels
(BUILTIN_REF) and in the TOSA reference model beside those of our integer graph, on {REAL} real and {RANDOM} random
inputs. Then operators that Vela 5.2.0 puts on the NPU and on the CPU for the TFLite of each network, its estimate of
the cycles, and ours over it.

{table(tables["int8"])}

## 16-bit activations

The float networks with `--activations int16`.

{table(tables["int16"])}
"""


if __name__ == "__main__":
    typer.run(main)

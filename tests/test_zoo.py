"""Whole trained networks: the numpy reference, TVM's CPU code and the NPU simulator agree bit for bit."""

import dataclasses
import importlib.util
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.backends import accelerators, gpu, npu, relax
from qcompiler.backends.base import AcceleratorFunction
from qcompiler.compile import EIGHT_BITS, Placed, place
from qcompiler.costs import region_cost
from qcompiler.graph import QCOMPILER_DOMAIN, dtype_of, is_op, users, value_name
from qcompiler.integer.reference import Executor
from qcompiler.options import Options
from qcompiler.partition import Region, partition
from qcompiler.quant.types import WeightRequest
from qcompiler.runtime import Executable, Simulator, gpu_problem
from qcompiler.simulator.cost import price
from qcompiler.target import Target

MODELS = (
    "mnist_cnn",
    "kws_dscnn",
    "kws_dscnn_tflite_int8_qdq",
    "resnet8_cifar10",
    "resnet8_tflite_int8_qdq",
    "ad01_autoencoder",
    "resnet20_cifar10",
    "squeezenet11",
    "mobilenet_v1_025_128",
    "mobilenet_v1_025_128_tflite_qat_qdq",
    "fastestdet_352",
    "ultraface_slim_320",
)
TARGETS = ("arm-npu", "systolic-npu", "x86-cpu")
CALIBRATION_SAMPLES = 4
SAMPLES = 2

Arrays = Mapping[str, np.ndarray]


def real_inputs(zoo: Path, name: str, count: int) -> tuple[Path, list[dict[str, np.ndarray]]]:
    """The model and the inputs that the zoo's evaluation feeds it first."""
    script = importlib.util.spec_from_file_location("eval_ref", zoo / "eval_ref.py")
    assert script is not None and script.loader is not None
    evaluation = importlib.util.module_from_spec(script)
    script.loader.exec_module(evaluation)
    entry = next(e for e in json.loads((zoo / "manifest.json").read_text())["models"] if e["name"] == name)
    run, fed = evaluation.ort_run(str(zoo / entry["model"]), 1), []

    def record(inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        fed.append(dict(inputs))
        return run(inputs)

    evaluation.evaluate(entry, record, count)
    return zoo / entry["model"], fed


def expose_integers(model: ir.Model) -> list[str]:
    """Make an output of every integer tensor that leaves the integer part and depends on no float operator."""
    tainted: set[ir.Value] = set()
    exposed: list[ir.Value] = []
    for node in model.graph:
        exact = node.domain == QCOMPILER_DOMAIN or is_op(node, "QuantizeLinear", "DequantizeLinear")
        integer = all(dtype_of(value).kind in "iu" for value in node.outputs)
        if any(value in tainted for value in node.inputs) or not (exact or integer):
            tainted.update(node.outputs)
            continue
        for value in node.outputs:
            leaves = value.is_graph_output() or any(is_op(user, "DequantizeLinear") for user in users(value))
            if leaves and dtype_of(value).kind in "iu":
                exposed.append(value)
    model.graph.outputs.extend(value for value in exposed if not value.is_graph_output())
    return [value_name(value) for value in exposed]


def built(model: ir.Model, target: Target, library: Path) -> tuple[relax.Lowered, Executable]:
    parts = partition(model, target, can_run=partial(accelerators.can_run, target=target))
    numbers = {region.name: number for number, region in enumerate(parts.regions)}

    def driver(region: Region) -> AcceleratorFunction:
        if region.backend == "gpu":
            return gpu.region_function(region, target, numbers[region.name])
        return npu.region_function(npu.compile_region(region, target), numbers[region.name])

    lowered = relax.lower(model, parts, target, driver)
    relax.build(lowered, target.host, library)
    if (problem := gpu_problem(library)) is not None:
        pytest.skip(problem)
    return lowered, Executable(library, lowered.parameters)


def outputs(lowered: relax.Lowered, executable: Executable, inputs: Arrays) -> dict[str, np.ndarray]:
    results = executable.run([inputs[spec.name] for spec in lowered.inputs])
    return {spec.name: array for spec, array in zip(lowered.outputs, results, strict=True)}


def placed(
    zoo: Path,
    name: str,
    target: str,
    formats: WeightRequest = EIGHT_BITS,
    overrides: tuple[str, ...] = (),
    samples: int = SAMPLES,
) -> tuple[Placed, list[dict[str, np.ndarray]]]:
    path, fed = real_inputs(zoo, name, CALIBRATION_SAMPLES + samples)
    calibration = {key: np.concatenate([inputs[key] for inputs in fed[:CALIBRATION_SAMPLES]]) for key in fed[0]}
    done = place(path, target, Options(calibration=calibration, formats=formats, overrides=overrides))
    return done, fed[CALIBRATION_SAMPLES:]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("target", TARGETS)
def test_reference_cpu_and_simulator_agree(zoo: Path, tmp_path: Path, name: str, target: str) -> None:
    check_agreement(*placed(zoo, name, target), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet20_cifar10", "squeezenet11"])
@pytest.mark.parametrize("target", ["systolic-npu", "x86-cpu"])
def test_four_bit_weights(zoo: Path, tmp_path: Path, name: str, target: str) -> None:
    """All layers but the first and last in half the bytes, and bit-exact."""
    done, samples = placed(zoo, name, target, WeightRequest("int4"))
    products = [item for item in done.partition.placements if item.op in ("Conv", "Gemm")]
    assert [item.node for item in products if item.precision.endswith("int8")] == [products[0].node, products[-1].node]
    assert all(item.backend == ("cpu" if done.target.npu is None else "npu") for item in products[1:-1])
    eight, _ = placed(zoo, name, target)
    bytes_of = [
        sum(
            [value.const_value.nbytes for node in model.graph if node.op_type in ("QConv", "QGemm")
             if (value := node.inputs[1]) is not None and value.const_value is not None][1:-1]
        )
        for model in (eight.integer, done.integer)
    ]  # fmt: skip
    assert bytes_of[0] == 2 * bytes_of[1] > 100_000
    check_agreement(done, samples, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("mobilenet_v1_025_128", "x86-cpu"), ("mobilenet_v1_025_128", "arm-npu"), ("kws_dscnn", "ethos-u85-256"),
        ("resnet20_cifar10", "arm-npu"), ("resnet8_cifar10", "systolic-npu"), ("squeezenet11", "systolic-npu"),
    ],
)  # fmt: skip
def test_sixteen_bit_activations(zoo: Path, tmp_path: Path, name: str, target: str) -> None:
    """Every product on the accelerator, where there is one."""
    done, samples = placed(zoo, name, target, WeightRequest(activations="int16"))
    products = {(item.precision, item.backend) for item in done.partition.placements if item.op in ("Conv", "Gemm")}
    assert products == {("int16*int8", "cpu" if done.target.npu is None else "npu")}
    check_agreement(done, samples, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_small_scratchpad(zoo: Path, tmp_path: Path, name: str) -> None:
    """32 KiB run everything that the whole scratchpad runs: in more tiles, in more time, to the same bits."""
    roomy, _ = placed(zoo, name, "arm-npu")
    tight, samples = placed(zoo, name, "arm-npu", overrides=("memories.sram.size=32KiB",))
    on_npu = [[item.node for item in done.partition.placements if item.backend == "npu"] for done in (roomy, tight)]
    assert set(on_npu[0]) <= set(on_npu[1]) and on_npu[0]
    commands, cycles = zip(*map(work_of, (roomy, tight)), strict=True)
    assert cycles[1] >= cycles[0] and commands[1] >= commands[0]
    check_agreement(tight, samples, tmp_path)


GPU_FOR_NOTHING = (
    "gpu.launch=0 us", "gpu.crossing.sync=0 us", "gpu.crossing.bandwidth=100000 GB/s",
    "gpu.memory.bandwidth=100000 GB/s",
)  # fmt: skip
"""With its real costs a GPU leaves the smallest networks to the CPU."""
MANY_SAMPLES = ("mnist_cnn", "kws_dscnn", "resnet8_cifar10", "resnet20_cifar10", "mobilenet_v1_025_128")
FEW_SAMPLES = ("squeezenet11", "mobilenet_v1_025_128_tflite_qat_qdq")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MANY_SAMPLES, *FEW_SAMPLES])
def test_opencl(zoo: Path, tmp_path: Path, name: str) -> None:
    """Every integer operator on the GPU; by PoCL on a CPU where there is none. benchmarks/gpu.py runs the rest."""
    count = 20 if name in MANY_SAMPLES else SAMPLES
    done, samples = placed(zoo, name, "opencl-gpu", overrides=GPU_FOR_NOTHING, samples=count)
    elsewhere = [item.op for item in done.partition.placements if item.backend == "cpu" and item.precision != "float32"]
    assert elsewhere == [] and len(samples) == count
    check_agreement(done, samples, tmp_path)


def work_of(done: Placed) -> tuple[int, float]:
    """Words of all commands, and cycles, of the accelerator's regions."""
    regions = [npu.compile_region(region, done.target) for region in done.partition.regions if region.backend == "npu"]
    costs = [region_cost(program, done.target) for program in regions]
    return sum(len(npu.words(program)) for program in regions), sum(cost.cycles for cost in costs)


def check_agreement(done: Placed, samples: list[dict[str, np.ndarray]], tmp_path: Path) -> None:
    """On every integer tensor that leaves the integer part, bit for bit."""
    integer_names = expose_integers(done.integer)
    assert integer_names
    reference = Executor(done.integer)
    chips = [done.target] + ([done.target.model_copy(update={"npu": None})] if done.target.npu else [])
    for index, chip in enumerate(chips):
        lowered, executable = built(done.integer, chip, tmp_path / f"{index}.so")
        for inputs in samples:
            wanted = reference.run(inputs)
            got = outputs(lowered, executable, inputs)
            for key in integer_names:
                assert np.array_equal(wanted[key], got[key]), (key, "npu" if chip.npu else "cpu")
            for key in set(wanted) - set(integer_names):
                # Floats follow a softmax or an exponential, whose last bits are the mathematics library's.
                np.testing.assert_allclose(got[key], wanted[key], rtol=1e-4, atol=1e-5 * np.abs(wanted[key]).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenet_v1_025_128", "fastestdet_352"])
@pytest.mark.parametrize("target", ["arm-npu", "systolic-npu"])
def test_the_simulator_logs_what_the_estimate_priced(zoo: Path, tmp_path: Path, name: str, target: str) -> None:
    done, samples = placed(zoo, name, target)
    lowered, executable = built(done.integer, done.target, tmp_path / "model.so")
    simulator = Simulator(tmp_path / "model.so")
    simulator.reset()
    outputs(lowered, executable, samples[0])
    log = simulator.log()
    starts = [*(first for _, first in log.regions), len(log.words)]
    regions = [region for region in done.partition.regions if region.backend == "npu"]
    assert len(regions) == len(log.regions) > 0
    for region, start, end in zip(regions, starts, starts[1:], strict=False):
        program = npu.compile_region(region, done.target)
        assert np.array_equal(log.words[start:end], npu.words(program))
        bases = {program.bases.blob: done.target.npu.weight_memory} if done.target.npu else {}
        logged, estimated = (price(w, done.target, bases) for w in (log.words[start:end], npu.words(program)))
        assert logged.cycles == estimated.cycles > 0 and dataclasses.asdict(logged) == dataclasses.asdict(estimated)

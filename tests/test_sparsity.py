"""Weights of which two in four are zero: short and fast where the spec says so, and the same integers."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from small_networks import save_network

from qcompiler import cli
from qcompiler.backends import npu, relax
from qcompiler.backends.accelerators import can_run
from qcompiler.backends.npu import NpuProgram
from qcompiler.compile import Placed, place, schedule
from qcompiler.costs import region_cost
from qcompiler.errors import QCompilerError
from qcompiler.exact_session import exact_session
from qcompiler.graph import const_of, data_input
from qcompiler.integer.reference import execute
from qcompiler.integer.sparsity import is_2_of_4, pack_2_of_4
from qcompiler.options import Options
from qcompiler.partition import partition
from qcompiler.quant.types import PruneRequest, WeightRequest, WeightType
from qcompiler.runtime import Executable
from qcompiler.simulator import isa
from qcompiler.target_loader import load_target

SPARSE = "ethos-u85-256"


def thinned(rng: np.random.Generator, shape: tuple[int, ...], axis: int = 1) -> np.ndarray:
    """Random weights with zeros in two of every four along the input channels, in a few blocks three or four."""
    weights = np.moveaxis((rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32), axis, -1)
    blocks = weights.reshape(-1, 4).copy()
    order = np.argsort(rng.random(blocks.shape), axis=1)
    np.put_along_axis(blocks, order[:, : 2 + (rng.random() < 0.5)], 0, axis=1)
    blocks[:3] = 0
    return np.ascontiguousarray(np.moveaxis(blocks.reshape(weights.shape), -1, axis))


def network(path: Path, seed: int, *, sparse: bool = True) -> Path:
    """Convolutions of 12 and 8 channels, a grouped and a depthwise one, which have no pattern, and a product."""
    rng = np.random.default_rng(seed)
    make = thinned if sparse else lambda rng, shape, axis=1: rng.standard_normal(shape).astype(np.float32)
    arrays = {
        "w0": rng.standard_normal((12, 3, 3, 3)).astype(np.float32),
        "w1": make(rng, (8, 12, 3, 2)),
        "w2": make(rng, (20, 8, 1, 1)),
        "w3": rng.standard_normal((20, 1, 3, 3)).astype(np.float32),
        "w4": make(rng, (7, 20)),
    }
    constants = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["c0"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c0"], ["r0"]),
        helper.make_node("Conv", ["r0", "w1"], ["c1"], strides=[1, 2]),
        helper.make_node("Conv", ["c1", "w2"], ["c2"]),
        helper.make_node("Conv", ["c2", "w3"], ["c3"], group=20, pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["c3"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "w4"], ["y"], transB=1),
    ]
    return save_network(path, nodes, constants, [1, 3, 10, 13], [1, 7])


def on_npu(model: Path, target: str | Path) -> Placed:
    """Placed with all that can be on the accelerator there, though handing so little over does not pay."""
    done = place(model, target)
    parts = partition(done.integer, done.target, can_run=partial(can_run, target=done.target), keep_islands=True)
    return replace(done, partition=parts)


def programs(done: Placed) -> list[NpuProgram]:
    return list(schedule(done).values())


def weight_types(done: Placed) -> list[str]:
    commands = [command for program in programs(done) for command in isa.decode(npu.words(program).tolist())]
    return [isa.DTYPES[command["dtype"]] for command in commands if command.opcode is isa.WEIGHTS]


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 1000))
def test_packing(rows: int, blocks: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    dense = np.zeros((rows, blocks, 4), np.int8)
    for row in dense.reshape(-1, 4):
        row[rng.permutation(4)[:2]] = rng.integers(-127, 128, 2) * (rng.random(2) < 0.8)
    packed = pack_2_of_4(dense.reshape(rows, -1))
    assert is_2_of_4(dense.reshape(rows, -1)) and packed.shape == (rows, 2 * blocks + -(-blocks // 2))
    back = np.zeros_like(dense)
    for row, stored in zip(back, packed, strict=True):
        for block, four in enumerate(row):
            places = stored[2 * blocks + block // 2] >> (4 * (block % 2)) & 15
            four[places & 3], four[places >> 2] = stored[2 * block : 2 * block + 2].view(np.int8)
    np.testing.assert_array_equal(back, dense)


def test_what_has_the_pattern() -> None:
    assert is_2_of_4(np.array([[0, 1, 2, 0], [0, 0, 0, 0]])) and not is_2_of_4(np.array([[0, 1, 2, 3]]))
    assert not is_2_of_4(np.zeros((2, 6))) and not is_2_of_4(np.zeros((0, 4)))


@pytest.mark.parametrize("seed", [1, 2])
def test_reference_and_simulator_agree(tmp_path: Path, seed: int) -> None:
    done = on_npu(network(tmp_path / "model.onnx", seed), SPARSE)
    assert {item.backend for item in done.partition.placements if item.op in ("Conv", "Gemm")} == {"npu"}
    types = weight_types(done)
    assert types.count("int8_2of4") >= 3 and "int8" in types
    feeds = {"x": np.random.default_rng(seed).standard_normal((1, 3, 10, 13)).astype(np.float32)}
    wanted = execute(done.integer, feeds)["y"]
    programs_of = schedule(done)
    lowered = relax.lower(
        done.integer, done.partition, done.target, lambda region: npu.region_function(programs_of[region.name], 0)
    )
    relax.build(lowered, done.target.host, tmp_path / "model.so")
    (got,) = Executable(tmp_path / "model.so", lowered.parameters).run([feeds["x"]])
    np.testing.assert_array_equal(got, wanted)
    assert len(np.unique(got)) > 3


def test_others_do_not_skip_zeros(tmp_path: Path) -> None:
    model = network(tmp_path / "model.onnx", 3)
    assert set(weight_types(on_npu(model, "ethos-u65-256"))) == {"int8"}
    assert set(weight_types(on_npu(network(tmp_path / "dense.onnx", 3, sparse=False), SPARSE))) == {"int8"}


def wide(path: Path, *, sparse: bool) -> Path:
    """One large convolution, bound by its multiplications."""
    rng = np.random.default_rng(4)
    weights = thinned(rng, (128, 128, 3, 3)) if sparse else rng.standard_normal((128, 128, 3, 3)).astype(np.float32)
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 128, 28, 28]) for name in "xy"]
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="y", pads=[1, 1, 1, 1])
    graph = helper.make_graph([node], "wide", infos[:1], infos[1:], [numpy_helper.from_array(weights, "w")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_cycles_bytes_and_energy(tmp_path: Path) -> None:
    costs, sizes = [], []
    for sparse in (False, True):
        done = place(wide(tmp_path / f"{sparse}.onnx", sparse=sparse), SPARSE)
        (program,) = programs(done)
        costs.append(region_cost(program, done.target))
        sizes.append(sum((span.end - span.start) * span.ratio for span in program.encoded))
    dense, thin = costs
    assert thin.macs == dense.macs
    assert 1.6 < dense.cycles / thin.cycles < 2.01
    assert dense.energy.macs == pytest.approx(2 * thin.energy.macs)
    assert sizes[1] < 0.7 * sizes[0]


def test_a_spec_may_say_so_of_any_engine(tmp_path: Path) -> None:
    spec = tmp_path / "mine.yaml"
    spec.write_text(
        "extends: systolic-npu\ndescription: mine\nsources: [test]\nnpu:\n  engines:\n    mxu:\n"
        '      sparsity: {pattern: "2:4", speedup: 2, precisions: [int8*int8]}\n'
    )
    model = network(tmp_path / "model.onnx", 5)
    assert "int8_2of4" in weight_types(on_npu(model, spec)) and "int8_2of4" not in weight_types(
        place(model, "systolic-npu")
    )
    spec.write_text(spec.read_text().replace("[int8*int8]", "[uint8*int8]"))
    with pytest.raises(QCompilerError, match=r"no rate for 'uint8\*int8'"):
        load_target(spec)


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
DIGITS, CALIBRATION = EXAMPLES / "digits.onnx", EXAMPLES / "digits_calibration.npz"


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_pruned_and_quantized(weights: WeightType) -> None:
    """Zeros survive the learned rounding, the pattern reaches the accelerator, and accuracy stays."""
    options = Options(
        calibration=CALIBRATION,
        formats=WeightRequest(weights),
        prune=PruneRequest(two_of_four=True),
        quality="balanced",
    )
    done = place(DIGITS, SPARSE if weights == "int8" else "systolic-npu", options)
    weighted = [node for node in done.integer.graph if node.op_type in ("QConv", "QGemm")]
    arrays = [const_of(data_input(node, 1)) for node in weighted]
    pruned = [array for array in arrays if array is not None and is_2_of_4(array.astype(np.int8))]
    assert pruned and all(array.any() for array in pruned)
    if weights == "int8":
        assert weight_types(done).count("int8_2of4") == len(pruned)
    session = exact_session(ir.to_proto(done.quantized).SerializeToString())
    with np.load(EXAMPLES / "digits_test.npz") as data:
        images, labels = data["image"], data["label"]
    found = [int(np.asarray(session.run(None, {"image": image[None]})[0]).argmax()) for image in images]
    assert np.mean(np.array(found) == labels) > 0.93


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*options: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as leaving:
            cli.main(["explain", *options, "--json"])
        return int(leaving.value.code or 0), capsys.readouterr().out

    cycles = []
    for extra in ((), ("--prune", "2:4")):
        code, shown = run(str(wide_stack(tmp_path / "model.onnx")), "-t", SPARSE, *extra)
        assert code == 0
        cycles.append(json.loads(shown)["totals"]["npu_cycles"])
    assert cycles[1] < 0.8 * cycles[0]
    code, shown = run(str(DIGITS), "-t", SPARSE, "--prune", "1:2")
    assert code == 2 and "--prune 1:2: write a fraction" in shown
    ir.save(place(DIGITS, SPARSE).quantized, tmp_path / "quantized.onnx")
    code, shown = run(str(tmp_path / "quantized.onnx"), "-t", SPARSE, "--prune", "0.5")
    assert code == 2 and "--prune cannot be heeded" in shown


def wide_stack(path: Path) -> Path:
    """Three dense convolutions; pruning leaves the first and the last alone."""
    rng = np.random.default_rng(4)
    constants = [
        numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), f"w{index}")
        for index, shape in enumerate(((128, 8, 1, 1), (128, 128, 3, 3), (8, 128, 1, 1)))
    ]
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 8, 28, 28]) for name in ("c0", "c3")]
    nodes = [
        helper.make_node("Conv", [f"c{i}", f"w{i}"], [f"c{i + 1}"], name=f"c{i + 1}", pads=[i % 2] * 4)
        for i in range(3)
    ]
    graph = helper.make_graph(nodes, "stack", infos[:1], infos[1:], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path

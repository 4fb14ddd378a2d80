"""Regions through Arm's Vela, and what is refused before."""

import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from qcompiler import tools
from qcompiler.backends.npu import compile_region
from qcompiler.costs import region_cost
from qcompiler.emit import vela
from qcompiler.emit.regions import check_emission, emit_regions
from qcompiler.emit.vela import compile_network
from qcompiler.errors import QCompilerError
from qcompiler.partition import Partition
from qcompiler.target import VelaConfig
from qcompiler.target_loader import load_target

U55 = VelaConfig(
    accelerator="ethos-u55-128", system_config="Ethos_U55_High_End_Embedded", memory_mode="Shared_Sram"
)  # fmt: skip


@pytest.fixture
def network(net, realized, tmp_path) -> Path:
    """A .tflite of a convolution, a pool and a table that Vela has no operator for."""
    pytest.importorskip("ai_edge_litert", reason="the extra 'ethosu' is not installed")
    from qcompiler.emit.regions import write_tflite

    graph = net(1)
    x = graph.op("Relu", graph.conv(graph.input(1, 3, 16, 16), 3, 16, (3, 3), pads=[1, 1, 1, 1]))
    x = graph.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    y = graph.conv(graph.op("Exp", graph.op("Mul", x, graph.const(-1.0))), 16, 4, (1, 1))
    return write_tflite(realized(graph, y).region, tmp_path)


def test_vela_compiles_and_estimates(network, tmp_path):
    pytest.importorskip("ethosu", reason="the extra 'ethosu' is not installed")
    folder = tmp_path / "made"
    folder.mkdir()
    result = compile_network(network, U55, folder)
    assert result.cycles > 1000 and result.scratchpad > 16 * 16 * 16
    assert result.npu_operators >= 2
    # The table became CAST, ADD and GATHER, of which the NPU runs the addition.
    assert result.cpu_operators == len(result.refusals) == 2
    assert any("GATHER" in refusal for refusal in result.refusals)
    assert {file.name for file in result.files} == {
        "npu_0_vela.tflite", "npu_0_per-layer.csv", "npu_0_summary.csv"
    }  # fmt: skip
    assert all(file.parent == folder for file in result.files)
    assert b"COP1" in (folder / "npu_0_vela.tflite").read_bytes(), "no command stream"


def test_vela_says_what_it_does_not_know(network, tmp_path):
    pytest.importorskip("ethosu", reason="the extra 'ethosu' is not installed")
    config = U55.model_copy(update={"system_config": "Ethos_U55_Made_Up"})
    with pytest.raises(QCompilerError, match=r"(?s)Vela failed on npu_0.tflite for ethos-u55-128.*Made_Up"):
        compile_network(network, config, tmp_path)


def test_vela_gets_tosa_where_tflite_computes_otherwise(net, realized, tmp_path):
    pytest.importorskip("ai_edge_litert", reason="the extra 'ethosu' is not installed")
    pytest.importorskip("ethosu", reason="the extra 'ethosu' is not installed")
    if tools.find("tosa-opt", beside_python=True) is None:
        pytest.skip("tosa-tools is not on PATH (it wants numpy < 2.2)")
    graph = net(3)
    x = graph.conv(graph.input(1, 3, 9, 9), 3, 16, (1, 1))
    made = realized(graph, graph.op("Resize", x, "", graph.const([1, 1, 2, 2]), mode="linear"))
    chip = load_target("ethos-u85-256")
    costs = {made.region.name: region_cost(compile_region(made.region, chip), chip)}
    (report,) = emit_regions(Partition((made.region,), ()), costs, chip, "vela", tmp_path)
    assert (tmp_path / "npu_0.tosa").exists() and (tmp_path / "npu_0_vela.tflite").exists()
    assert report.cpu_operators == 0 and report.vela_cycles > 0 and report.operators == len(made.region.nodes)


@pytest.fixture
def without_vela(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(vela, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setenv("PATH", "")


def test_says_how_to_install_vela(without_vela):
    with pytest.raises(QCompilerError, match=r"pip install 'qcompiler\[ethosu\]'"):
        check_emission(load_target("arm-npu"), "vela")


def test_takes_a_vela_program_beside_python(without_vela, tmp_path):
    program = tmp_path / "bin" / "vela"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho broken >&2\nexit 3\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    with pytest.raises(QCompilerError, match=r"(?s)Vela failed on x.tflite.*broken"):
        compile_network(tmp_path / "x.tflite", U55, tmp_path)


@pytest.mark.parametrize("form", ["tflite", "tosa", "vela"])
def test_refuses_targets_without_an_accelerator(form):
    with pytest.raises(QCompilerError, match="x86-cpu has no accelerator"):
        check_emission(load_target("x86-cpu"), form)


def test_asks_the_spec_whether_vela_knows_the_chip():
    with pytest.raises(QCompilerError, match="systolic-npu is no Ethos-U that Vela knows"):
        check_emission(load_target("systolic-npu"), "vela")


@pytest.mark.parametrize("name", ["32", "64", "128", "256"])
def test_every_ethos_u55_is_known_to_vela_by_its_own_name(name):
    config = load_target(f"ethos-u55-{name}").emit.vela
    assert config is not None and config.accelerator == f"ethos-u55-{name}"


def test_the_command_line_puts_command_streams_into_the_bundle(tmp_path):
    pytest.importorskip("ethosu", reason="the extra 'ethosu' is not installed")
    pytest.importorskip("ai_edge_litert", reason="the extra 'ethosu' is not installed")
    rng = np.random.default_rng(2)
    weight = onnx.numpy_helper.from_array(rng.normal(0, 0.2, (32, 3, 3, 3)).astype(np.float32), "w")
    node = onnx.helper.make_node("Conv", ["x", "w"], ["y"], "conv", pads=[1, 1, 1, 1])
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node], "g", [info("x", 1, (1, 3, 64, 64))], [info("y", 1, (1, 32, 64, 64))], [weight]
    )
    file = tmp_path / "net.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), file)
    arguments = ["compile", str(file), "--emit", "vela", "-o", "net.qc"]
    command = [sys.executable, "-c", "from qcompiler.cli import main; main()", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Our estimate beside Vela's" in done.stdout
    names = {path.name for path in (tmp_path / "net.qc").iterdir()}
    assert {"npu_1.tflite", "npu_1_vela.tflite", "npu_1_per-layer.csv", "npu_1_summary.csv"} <= names

    import qcompiler

    (estimate,) = qcompiler.load(tmp_path / "net.qc").report.vela
    assert estimate.cpu_operators == 0 and not estimate.refusals
    assert 0.5 < estimate.cycles / estimate.vela_cycles < 2

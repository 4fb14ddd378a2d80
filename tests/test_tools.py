"""Missing tools: one line that names what to install, and nothing else is the worse for it."""

import sys
from pathlib import Path

import pytest

from qcompiler import tools
from qcompiler.compile import build, explain
from qcompiler.emit.tosa import tosa_program
from qcompiler.errors import QCompilerError
from qcompiler.options import Options
from qcompiler.target_loader import load_target

EAGER_GPU = ("gpu.launch=0 us", "gpu.crossing.sync=0 us", "host.mac_rate.int8*int8=0.001 MAC/cycle")
"""What makes the GPU worth its while for a tiny model."""
DIGITS = Path(__file__).resolve().parents[1] / "examples" / "digits.onnx"


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine with nothing on PATH, nor beside Python."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))


def message(error: pytest.ExceptionInfo[QCompilerError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.usefixtures("bare")
def test_each_tool_names_what_to_install() -> None:
    with pytest.raises(QCompilerError) as error:
        tools.c_compiler()
    assert message(error).endswith("install one: apt-get install gcc libc6-dev, or set CC to the one to use")
    with pytest.raises(QCompilerError) as error:
        tools.cross_compiler("aarch64-linux-gnu")
    assert "aarch64-linux-gnu-gcc" in message(error) and "apt-get install gcc-aarch64-linux-gnu" in message(error)
    with pytest.raises(QCompilerError) as error:
        tosa_program("tosa-opt")
    assert "tosa-opt is not on PATH; it is needed to write TOSA. Install it: " in message(error)
    with pytest.raises(QCompilerError) as error:
        tools.require_package("no_such_package", purpose="to test", install="pip install it")
    assert message(error) == "the Python package no_such_package is not installed; it is needed to test: pip install it"


@pytest.mark.usefixtures("bare")
def test_cuda_kernels_need_nvcc(tmp_path: Path) -> None:
    """Whatever is decided and priced needs no tool; what a driver or a compiler must do names it."""
    assert explain(DIGITS, "cuda-gpu", Options(overrides=EAGER_GPU)).totals.latency > 0
    with pytest.raises(QCompilerError) as error:
        build(DIGITS, "cuda-gpu", Options(overrides=EAGER_GPU), output=tmp_path / "digits.qc")
    assert "nvcc is not on PATH" in message(error) and "apt-get install nvidia-cuda-toolkit" in message(error)


@pytest.mark.usefixtures("bare")
def test_without_a_c_compiler_nothing_is_built_but_all_is_explained(tmp_path: Path) -> None:
    report = explain(DIGITS, "npu-dsp")
    assert report.totals.latency > 0
    with pytest.raises(QCompilerError, match="no C compiler found"):
        build(DIGITS, "arm-npu", output=tmp_path / "digits.qc")
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "my-tool"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", "my-tool")
    assert tools.find("absent", "my-tool") == str(program) == tools.require("my-tool", purpose="", install="")
    assert tools.find("absent") is None
    assert tools.c_compiler() == "my-tool"
    (tmp_path / "riscv64-linux-gnu-gcc").symlink_to(program)
    assert tools.cross_compiler("riscv64-linux-gnu") == ("riscv64-linux-gnu-gcc",)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert tools.find("my-tool") is None
    assert tools.find("my-tool", beside_python=True) == str(program)


def test_a_cross_compiler_is_clang_where_lld_is_there_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("clang", "ld.lld"):
        with pytest.raises(QCompilerError, match="clang lld"):
            tools.cross_compiler("aarch64-linux-gnu")
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    assert tools.cross_compiler("aarch64-linux-gnu")[:2] == ("clang", "--target=aarch64-linux-gnu")
    assert load_target("arm-cpu").host.tvm_target["mtriple"] == "aarch64-linux-gnu"

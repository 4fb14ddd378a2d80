"""A driver of the user's in place of the simulator: the example, which must lose nothing on the way."""

import subprocess
from pathlib import Path

import numpy as np
import pytest

from qcompiler.bundle import Bundle
from qcompiler.compile import build
from qcompiler.errors import QCompilerError
from qcompiler.runtime import Simulator
from qcompiler.tools import c_compiler

STUBS = Path(__file__).resolve().parents[1] / "runtime_stubs"
DRIVER = [STUBS / "driver" / "queue_driver.c", STUBS / "driver" / "loopback.c"]
DIGITS = Path(__file__).resolve().parents[1] / "examples" / "digits.onnx"


def logged(bundle: Bundle, inputs: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Outputs, and the command words that reached the simulator."""
    simulator = Simulator(bundle.path / "model.so")
    simulator.reset()
    return bundle.run(inputs), simulator.log().words


@pytest.mark.parametrize("target", ["systolic-npu", "arm-npu"])
def test_the_example_driver_gives_the_same_bits_from_the_same_words(tmp_path: Path, target: str) -> None:
    plain = build(DIGITS, target, output=tmp_path / "plain.qc")
    driven = build(DIGITS, target, output=tmp_path / "driven.qc", runtime=DRIVER)
    (tensor,) = plain.inputs
    inputs = {tensor.name: np.random.default_rng(4).uniform(0, 16, (3, *tensor.shape[1:])).astype(np.float32)}
    (wanted, words), (got, queued) = logged(plain, inputs), logged(driven, inputs)
    for name, array in wanted.items():
        np.testing.assert_array_equal(got[name], array)
        assert len(np.unique(array)) > 3
    np.testing.assert_array_equal(queued, words)
    assert len(words) > 3 * 256, "more than one block went through the queue"
    assert driven.report.self_check is None and plain.report.self_check is not None
    assert "driven by queue_driver.c, loopback.c, and so not run to be checked" in driven.report.warnings


def test_the_driver_alone_is_c99_and_leaves_the_device_open(tmp_path: Path) -> None:
    flags = ["-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", f"-I{STUBS / 'abi'}", f"-I{STUBS / 'simulator'}"]
    for file in DRIVER:
        subprocess.run([c_compiler(), *flags, "-c", str(file), "-o", str(tmp_path / f"{file.stem}.o")], check=True)
    symbols = subprocess.run(["nm", "-u", str(tmp_path / "queue_driver.o")], capture_output=True, text=True, check=True)
    wanted = {line.split()[-1] for line in symbols.stdout.splitlines() if "device_" in line}
    declared = (STUBS / "driver" / "device.h").read_text()
    assert wanted == {f"device_{name}" for name in ("begin", "map", "submit", "wait", "end", "fail")}
    assert all(f" {name}(" in declared for name in wanted)


def test_a_driver_of_ones_own_may_include_what_lies_beside_it(tmp_path: Path) -> None:
    """Here a device that computes nothing; outputs are whatever the host put there."""
    (tmp_path / "chip.h").write_text("enum { CHIP_SUBMITS = 1 };\n")
    (tmp_path / "device.c").write_text(
        '#include <stdlib.h>\n#include "device.h"\n#include "chip.h"\n'
        "int submits;\n"
        "void device_begin(int32_t region, int32_t bytes) { (void)region; (void)bytes; }\n"
        "uint64_t device_map(void *pointer, int64_t bytes) { (void)bytes; return (uint64_t)(uintptr_t)pointer; }\n"
        "void device_submit(const int32_t *words, int32_t count, const device_buffer *buffers, int32_t n) {\n"
        "    (void)words; (void)count; (void)buffers; (void)n; submits += CHIP_SUBMITS;\n}\n"
        "void device_wait(void) {}\nvoid device_end(void) {}\n"
        "void device_fail(const char *message) { (void)message; abort(); }\n"
    )
    bundle = build(DIGITS, "systolic-npu", output=tmp_path / "digits.qc", runtime=[DRIVER[0], tmp_path / "device.c"])
    (tensor,) = bundle.inputs
    assert set(bundle.run({tensor.name: np.zeros(tensor.shape, np.float32)})) == {out.name for out in bundle.outputs}
    with pytest.raises(QCompilerError, match="no NPU simulator"):
        Simulator(bundle.path / "model.so")


@pytest.mark.parametrize(
    ("target", "name", "text", "message"),
    [
        ("x86-cpu", "driver.c", "int unused;\n", "nothing of this model runs on an accelerator that a driver feeds"),
        ("systolic-npu", "driver.h", "", "is not a C source: give .c files"),
        ("systolic-npu", "absent.c", None, "cannot read .*absent.c: No such file"),
        ("systolic-npu", "driver.c", "this is no C\n", "the C compiler could not build .*driver.c"),
    ],
)
def test_a_driver_that_cannot_be_used(tmp_path: Path, target: str, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(QCompilerError, match=message):
        build(DIGITS, target, output=tmp_path / "digits.qc", runtime=[tmp_path / name])
    assert not (tmp_path / "digits.qc").exists()

"""Targets and changed targets side by side: the figures are those `explain` and `compile` give."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

import qcompiler
from qcompiler.bench import bench, render
from qcompiler.cli import main
from qcompiler.compile import explain
from qcompiler.errors import QCompilerError
from qcompiler.options import Options

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
DIGITS, CALIBRATION = EXAMPLES / "digits.onnx", EXAMPLES / "digits_calibration.npz"


def test_each_target_with_and_without_each_variant() -> None:
    variants = [["memories.sram.size=8KiB"], ["npu.clock=100MHz", "memories.sram.size=16 KiB"]]
    columns = bench(DIGITS, ["arm-npu", "systolic-npu"], variants).columns
    assert [column.target for column in columns] == [
        f"{name}{change}"
        for name in ("arm-npu", "systolic-npu")
        for change in ("", " with memories.sram.size=8KiB", " with npu.clock=100MHz, memories.sram.size=16KiB")
    ]
    plain, small, slow = columns[:3]
    assert plain.sram == 2 << 20 and small.sram == 8 << 10 and slow.sram == 16 << 10
    assert small.peak_sram <= 8 << 10
    assert slow.latency > plain.latency
    for column, overrides in zip(columns[:3], ([], *variants), strict=True):
        totals = explain(DIGITS, "arm-npu", Options(overrides=overrides)).totals
        assert (column.latency, column.energy, column.traffic) == (totals.latency, totals.energy, totals.traffic)
        assert column.npu_cycles == totals.npu_cycles and column.utilisation is not None
        peak = 128 * column.npu_cycles  # MAC/cycle of the Ethos-U55-128
        # Vector work leaves the array idle; borders of its blocks are not counted as MACs.
        assert column.utilisation == pytest.approx(totals.npu_macs / peak, rel=0.02)
    assert all(column.sqnr is None for column in columns)


def test_a_cpu_beside_an_accelerator_with_accuracy() -> None:
    columns = bench(DIGITS, ["arm-npu", "x86-cpu"], options=Options(calibration=CALIBRATION, samples=32)).columns
    on_npu, on_cpu = columns
    assert on_cpu.utilisation is None and on_cpu.npu_macs == 0 and on_cpu.fallbacks == {} and on_cpu.sram == 0
    assert on_npu.fallbacks == {"QuantizeLinear": 1, "DequantizeLinear": 1}
    check = qcompiler.compile(DIGITS, "arm-npu", calibration=CALIBRATION, samples=32).report.self_check
    assert check is not None and on_npu.sqnr is not None and check.outputs[0].sqnr is not None
    # onnxruntime sums in float what the compiled code sums in integers.
    assert on_npu.sqnr == pytest.approx(check.outputs[0].sqnr, abs=0.5)
    assert on_npu.top1_agreement == 1.0


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", str(DIGITS), "--targets", "arm-npu,x86-cpu"]
    with pytest.raises(SystemExit) as leaving:
        main([*arguments, "--json"])
    assert leaving.value.code in (0, None)
    printed = json.loads(capsys.readouterr().out)
    assert [column["target"] for column in printed["columns"]] == ["arm-npu", "x86-cpu"]
    assert printed["columns"][0]["macs"] == 191552
    with pytest.raises(SystemExit) as leaving:
        main(["bench", str(DIGITS), "--set", "memories.srm.size=1KiB"])
    assert leaving.value.code == 2
    assert "did you mean 'sram'?" in capsys.readouterr().err


def test_the_table_compares_with_the_first_column() -> None:
    comparison = bench(DIGITS, ["arm-npu"], [["clock=250MHz"]])
    console = Console(file=io.StringIO(), width=120)
    with console.capture() as captured:
        console.print(render(comparison))
    shown = captured.get()
    first, second = comparison.columns
    assert f"({second.latency / first.latency:.2f}×)" in shown and "clock=250MHz" in shown
    assert "191,552" in shown and "2: QuantizeLinear, DequantizeLinear" in shown


def test_no_target() -> None:
    with pytest.raises(QCompilerError, match="--targets names none"):
        bench(DIGITS, [])

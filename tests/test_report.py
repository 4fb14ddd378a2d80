import json
from dataclasses import replace

import pytest
from pydantic import ValidationError

from qcompiler.report import (
    Calibration,
    CascadedLayer,
    CascadeReport,
    LayerReport,
    OutputCheck,
    PlacementReport,
    Report,
    SelfCheck,
    Totals,
    as_text,
    byte_count,
    quantity,
)

REPORT = Report(
    model="net.onnx",
    target="some-npu",
    placements=(
        PlacementReport("conv_1", "conv_1_q.nhwc", "Conv", "npu", "mac", "int8*int8", None),
        PlacementReport("top_k", "top_k", "TopK", "cpu", "", "float32", "some-npu has no rule for TopK"),
    ),
    layers=(
        LayerReport(
            "conv_1", "conv_1_q.nhwc", "Conv", "npu", "mac", 1_000_000, 8000, 1.6e-5, 0.61, {"sram": 4096}, "sram", 2e-7
        ),
        LayerReport("top_k", "top_k", "TopK", "cpu", "cpu", 0, 500, 5e-7, None, {}, "compute", 1e-9),
    ),
    totals=Totals(2e-5, 8000, 1_000_000, 1_000_000, {"sram": 4096, "dram": 10}, 2048, 4096, 900, 3e-7),
    calibration=Calibration("mse", 64, False),
    self_check=SelfCheck(8, (OutputCheck("logits", 31.25, 1.0), OutputCheck("aux", None, None))),
    warnings=("the input 'x' is constant [in all samples]",),
    cascades=(
        CascadeReport(
            "npu_0",
            7,
            3072,
            (
                CascadedLayer("stem", "stem_q.nhwc", 9, 55, 11, "kept"),
                CascadedLayer("add_2", "add_2", 8, 55, None, ""),
            ),
        ),
    ),
)


def test_json_round_trip() -> None:
    again = Report.from_dict(json.loads(json.dumps(REPORT.to_dict())))
    assert again == REPORT
    assert again.totals.inferences_per_second == pytest.approx(50_000)


def test_a_foreign_dict_is_refused() -> None:
    with pytest.raises(ValidationError):
        Report.from_dict({"model": "net.onnx"})


def test_text_says_what_matters() -> None:
    text = as_text(REPORT)
    assert "some-npu has no rule for TopK" in text
    assert "1 of 2 operators on the accelerator, 1 on the CPU" in text
    assert "1,000,000" in text and "61%" in text and "4.0 KiB" in text
    assert "20.0 µs, 50,000 inferences/s" in text
    assert "31.2 dB" in text and "100.0%" in text and "identical" in text
    assert "1: 7 stripes, 3.0 KiB" in text and "stem" in text and "whole" in text
    # Square brackets are text here, not markup.
    assert "warning: the input 'x' is constant [in all samples]" in text
    assert max(len(line) for line in text.splitlines()) <= 160
    assert "do not trust" not in text


def test_text_warns_of_synthetic_ranges() -> None:
    text = as_text(replace(REPORT, calibration=Calibration("mse", 8, True)))
    assert "synthetic" in text and "do not trust the accuracy" in text


def test_text_without_accelerator_shows_no_sram() -> None:
    text = as_text(replace(REPORT, totals=replace(REPORT.totals, sram=0, peak_sram=0, npu_cycles=0)))
    assert "peak SRAM" not in text and "accelerator cycles" not in text


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0 s"), (1.5, "1.50 s"), (0.9996, "1,000 ms"), (0.012, "12.0 ms"), (3.4e-7, "340 ns"), (1234.0, "1,234 s")],
)
def test_quantity(value: float, shown: str) -> None:
    assert quantity(value, "s") == shown


@pytest.mark.parametrize(
    ("size", "shown"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3 << 20, "3.0 MiB"), (5 << 30, "5.0 GiB")]
)
def test_byte_count(size: int, shown: str) -> None:
    assert byte_count(size) == shown

"""The HTML page and the trace: what they show is what the report says, and they need nothing from elsewhere."""

import itertools
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from qcompiler.compile import explain
from qcompiler.options import Options
from qcompiler.report import Report, as_text
from qcompiler.simulator.trace import Timeline
from qcompiler.target import Npu
from qcompiler.target_loader import load_target
from qcompiler.views.lanes import RESOLUTION, lanes
from qcompiler.views.roofline import BOTTOM, HEIGHT, TOP, roofline
from qcompiler.views.scales import LogScale, even_ticks

DIGITS = Path(__file__).resolve().parents[2] / "examples/digits.onnx"
VOID = {"meta", "br", "link", "img", "input"}


class Page(HTMLParser):
    """Checks that tags nest and collects cells, tips and everything that could load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []
        self.tips: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.tags: set[str] = set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "td":
            self.cells.append(data)
        if self.open and self.open[-1] == "title":
            self.tips.append(data)


@pytest.fixture(scope="module", params=["arm-npu", "systolic-npu", "x86-cpu"])
def shown(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, str, str]:
    folder = tmp_path_factory.mktemp("views")
    report = explain(DIGITS, request.param, html=folder / "page.html", trace=folder / "trace.json")
    return report, (folder / "page.html").read_text("utf-8"), (folder / "trace.json").read_text("utf-8")


def test_the_page_stands_alone(shown: tuple[Report, str, str]) -> None:
    _, text, _ = shown
    page = Page(text)
    assert not page.tags & {"script", "link", "img", "iframe", "object"}
    assert not [name for name, _ in page.attributes if name in ("src", "href") or name.startswith("on")]
    assert "url(" not in text and "@import" not in text and "http" not in text
    assert len(text) < 40_000


def test_the_page_says_what_the_report_says(shown: tuple[Report, str, str]) -> None:
    report, text, _ = shown
    page = Page(text)
    for layer in report.layers:
        assert layer.layer in page.cells
        if layer.macs:
            assert f"{layer.macs:,}" in page.cells
    for placement in report.placements:
        if placement.reason:
            assert placement.reason in page.cells
    assert "synthetic random inputs" in text
    busy = {layer.layer for layer in report.layers if layer.backend == "npu" and layer.macs}
    for name in busy:
        assert any(name in tip and "MAC/s" in tip for tip in page.tips), f"{name} has no point"
        assert any(name in tip and "busy from" in tip for tip in page.tips), f"{name} has no bar"


def test_equal_compilations_give_equal_pages(tmp_path: Path) -> None:
    for name in ("a.html", "b.html"):
        explain(DIGITS, "systolic-npu", html=tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_names_of_layers_are_text_not_markup(shown: tuple[Report, str, str], tmp_path: Path) -> None:
    from qcompiler.views.html import html_report

    report = replace(shown[0], model="<script>alert(1)</script>.onnx")
    page = html_report(report, Timeline((), (), 0.0), load_target("x86-cpu"))
    assert "<script" not in page and "&lt;script&gt;" in page


def test_the_trace_spans_the_inference(shown: tuple[Report, str, str]) -> None:
    report, _, text = shown
    events = [event for event in json.loads(text)["traceEvents"] if event["ph"] == "X"]
    microseconds = report.totals.latency * 1e6
    assert max(event["ts"] + event["dur"] for event in events) == pytest.approx(microseconds)
    macs = sum(event["args"].get("MACs", 0) for event in events)
    assert macs == report.totals.npu_macs
    # One track does one thing at a time.
    tracks: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in events:
        tracks.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    for spans in tracks.values():
        spans.sort()
        assert all(after[0] >= before[1] - 1e-6 for before, after in itertools.pairwise(spans))
    host = sum(layer.seconds for layer in report.layers if layer.backend == "cpu" or layer.op == "hand-over")
    assert sum(event["dur"] for event in events if event["pid"] == 2) == pytest.approx(host * 1e6)


def test_cascades_are_on_the_page_and_in_the_trace(tmp_path: Path) -> None:
    tight = Options(overrides=("memories.sram.size=1KiB",))
    report = explain(DIGITS, "arm-npu", tight, html=tmp_path / "page.html", trace=tmp_path / "trace.json")
    assert report.cascades
    cells = Page((tmp_path / "page.html").read_text("utf-8")).cells
    costed = {layer.node: layer for layer in report.layers}
    shown = {
        event["args"].get("cascade", "") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    }
    for number, cascade in enumerate(report.cascades, start=1):
        assert f"{number}: {len(cascade.layers)} operators in {cascade.stripes} stripes" in shown
        for layer in cascade.layers:
            assert layer.layer in cells and costed[layer.node].backend == "npu"
            assert 1 <= layer.stripe < layer.height and cascade.stripes * layer.stripe >= layer.height
            assert layer.buffer is None or layer.stripe <= layer.buffer <= layer.height
        assert 0 < cascade.buffers < 1024
    text = as_text(report)
    assert "Cascades" in text and "Cascades" not in as_text(replace(report, cascades=()))


def test_points_lie_under_the_compute_roof_and_between_the_axes() -> None:
    target = load_target("arm-npu")
    report = explain(DIGITS, target="arm-npu")
    assert isinstance(target.npu, Npu)
    drawn = roofline(target.npu, report.layers, report.placements)
    assert drawn is not None
    (compute,) = [roof for roof in drawn.roofs if roof.css == "compute"]
    assert "64 GMAC/s" in compute.label  # 128 MAC/cycle at 500 MHz
    multiplying = [layer for layer in report.layers if layer.macs and layer.backend == "npu"]
    assert len(drawn.points) == len(multiplying)
    for point in drawn.points:
        assert compute.y1 <= point.y <= HEIGHT - BOTTOM and point.y >= TOP
        assert drawn.left <= point.x <= drawn.right
    # Every slanted roof meets the compute roof.
    assert all(roof.y2 == pytest.approx(compute.y1) for roof in drawn.roofs if roof.css != "compute")


def test_bars_cover_the_time_they_stand_for(shown: tuple[Report, str, str]) -> None:
    _, text, _ = shown
    spans = [
        (float(start), float(length))
        for path in re.findall(r' d="(M[^"]*v26[^"]*)"', text)
        for start, length in re.findall(r"M([\d.]+) [\d.]+h([\d.]+)v", path)
    ]
    assert spans and all(start >= 96 and start + length <= 1064 + RESOLUTION for start, length in spans)
    assert max(start + length for start, length in spans) == pytest.approx(1064, abs=RESOLUTION)


def test_nothing_to_draw() -> None:
    assert lanes(Timeline((), (), 0.0)) is None
    npu = load_target("arm-npu").npu
    assert npu is not None and roofline(npu, (), ()) is None


def test_scales() -> None:
    scale = LogScale(1.0, 1000.0, 0.0, 300.0)
    assert [scale(value) for value in scale.ticks()] == pytest.approx([0, 100, 200, 300])
    assert LogScale(3.0, 60.0, 0, 1).ticks() == [5.0, 10.0, 20.0, 50.0]
    assert even_ticks(0.00047, 8) == pytest.approx([index * 1e-4 for index in range(5)])
    assert even_ticks(1.0, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])

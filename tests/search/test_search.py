"""A search as a whole: on the bundled digits, whose labels are known."""

import csv
import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler import cli
from qcompiler.bundle import load
from qcompiler.compile import estimate, place
from qcompiler.errors import QCompilerError
from qcompiler.formats_file import read_formats
from qcompiler.options import Options
from qcompiler.quant.types import WeightRequest
from qcompiler.search.budget import Budget
from qcompiler.search.files import FORMATS, FRONT_CSV, FRONT_JSON, FRONT_PAGE, save
from qcompiler.search.forms import form_of
from qcompiler.search.pricing import Cost
from qcompiler.search.search import Found, search

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
DIGITS, CALIBRATION, TEST = (EXAMPLES / name for name in ("digits.onnx", "digits_calibration.npz", "digits_test.npz"))
TARGET = "systolic-npu"
OPTIONS = Options(calibration=CALIBRATION, quality="balanced")


@pytest.fixture(scope="module")
def found() -> Found:
    return search(DIGITS, TARGET, OPTIONS, Budget(max_drop=0.01), evaluation=TEST)


def figures(cost: Cost) -> tuple[float, float, float]:
    return cost.latency, cost.energy, cost.weights


def test_cheaper_than_eight_bits_at_hardly_a_loss(found: Found) -> None:
    chosen, eight = found.search.chosen, found.search.point("int8")
    assert set(eight.formats) == {"int8"}
    assert all(ours < 0.8 * theirs for ours, theirs in zip(figures(chosen.cost), figures(eight.cost), strict=True))
    assert chosen.measured.samples == eight.measured.samples == 450
    assert chosen.measured.drop is not None and chosen.measured.drop <= 0.025
    assert eight.measured.top1 == pytest.approx(0.98, abs=0.01)


def test_points_are_estimated_as_compiled(found: Found) -> None:
    report, _ = estimate(place(DIGITS, TARGET, found.options))
    totals = report.totals
    assert figures(found.search.chosen.cost) == (totals.latency, totals.energy, totals.weights)
    formats = found.search.chosen.formats
    assert formats and set(formats.values()) - {"int8"}
    precisions = {item.layer: item.precision for item in report.placements}
    for layer, dtype in formats.items():
        assert (precisions[layer] == "int8*int8") == (dtype == "int8"), layer


def test_sums_of_layers_are_close_to_the_whole(found: Found) -> None:
    for point in found.search.points:
        assert point.predicted.weights == pytest.approx(point.cost.weights, rel=0.02)
        if not any(form_of(name).real for name in point.formats):
            # Neighbours overlap, so that the time of a layer depends on the next one's format too.
            assert point.predicted.latency == pytest.approx(point.cost.latency, rel=0.05)
            assert point.predicted.energy == pytest.approx(point.cost.energy, rel=0.05)
    eight = found.search.point("int8")
    assert figures(eight.predicted) == pytest.approx(figures(eight.cost))


def test_the_prediction_ranks_points(found: Found) -> None:
    rho = {item.measure: item.spearman for item in found.search.correlations}
    assert rho["noise"] > 0.9 and rho["disagreement"] > 0.8 and rho["expected loss of top-1"] > 0.7
    assert set(rho) == {"noise", "disagreement", "expected loss of top-1", "loss of top-1"}


def test_the_front(found: Found) -> None:
    points = found.search.points
    assert [point.cost.latency for point in points] == sorted((p.cost.latency for p in points), reverse=True)
    assert len({point.formats for point in points}) == len(points) == len({point.name for point in points})
    for point in points:
        beaten = [
            other.name
            for other in points
            if other.predicted_noise <= point.predicted_noise
            and all(a <= b for a, b in zip(figures(other.cost), figures(point.cost), strict=True))
            and (other.predicted_noise, other.cost) != (point.predicted_noise, point.cost)
        ]
        assert point.on_front == (not beaten)


def test_files(found: Found, tmp_path: Path) -> None:
    file = save(found, tmp_path / "out" / "front")
    folder = file.parent
    assert {path.name for path in folder.iterdir()} == {FORMATS, FRONT_JSON, FRONT_CSV, FRONT_PAGE}
    held = read_formats(file)
    assert held.formats == found.options.formats and held.model == "digits.onnx" and held.target == TARGET
    data = json.loads((folder / FRONT_JSON).read_text())
    assert data == found.search.to_dict()
    with (folder / FRONT_CSV).open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["point"] for row in rows] == [point.name for point in found.search.points]
    assert [float(row["latency_s"]) for row in rows] == pytest.approx(
        [p.cost.latency for p in found.search.points], rel=1e-5
    )
    assert sum(row["chosen"] == "1" for row in rows) == 1
    assert {row["conv_5 + relu_6"] for row in rows} > {"int8", "int4"}
    page = (folder / FRONT_PAGE).read_text("utf-8")
    dots = _Marks()
    dots.feed(page)
    assert dots.open == [] and dots.dots == 3 * len(found.search.points)
    assert "src=" not in page and "<script" not in page and "https:" not in page
    with pytest.raises(QCompilerError, match="cannot write into"):
        save(found, file)


class _Marks(HTMLParser):
    """Counts points in charts, and what is left open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.dots = 0
        self.inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "div" and ("class", "charts") in attrs:
            self.inside = True
        self.dots += self.inside and ("class", "dot") in attrs
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.dots += self.inside and ("class", "dot") in attrs

    def handle_endtag(self, tag: str) -> None:
        if tag == "div":
            self.inside = False
        assert self.open.pop() == tag


def test_limits_on_cost_are_kept_by_the_whole_model(found: Found) -> None:
    eight = found.search.point("int8").cost
    budget = Budget(max_latency=0.8 * eight.latency, max_weights=0.6 * eight.weights)
    options = replace(OPTIONS, samples=32, quality="fast")
    limited = search(DIGITS, TARGET, options, budget)
    cost = limited.search.chosen.cost
    assert cost.latency <= 0.8 * eight.latency and cost.weights <= 0.6 * eight.weights
    assert not limited.search.evaluated and limited.search.chosen.measured.samples == 32
    # Accuracy first: no point within the limits has less noise.
    within = [
        point.predicted_noise
        for point in limited.search.points
        if point.cost.latency <= 0.8 * eight.latency and point.cost.weights <= 0.6 * eight.weights
    ]
    assert limited.search.point(limited.search.chosen.name).predicted_noise <= min(within) * (1 + 1e-6)


def test_budgets_that_cannot_be_kept(found: Found) -> None:
    options = replace(OPTIONS, samples=16, quality="fast")
    with pytest.raises(
        QCompilerError, match=r"no choice of formats keeps weights at most 1.0 KiB. The nearest has"
    ) as said:
        search(DIGITS, TARGET, options, Budget(max_weights=1024))
    assert "KiB; allow so much" in str(said.value)
    least = min(found.search.points, key=lambda point: point.cost.weights).cost.weights
    tight = Budget(max_drop=0.0001, max_weights=1.02 * least)
    with pytest.raises(QCompilerError, match=r"the best choice of formats loses .* more than 0.01%"):
        search(DIGITS, TARGET, options, tight)


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(QCompilerError, match="give --calibration"):
        search(DIGITS, TARGET)
    few = replace(OPTIONS, samples=4)
    with pytest.raises(QCompilerError, match="--labels are those of the samples of --evaluate"):
        search(DIGITS, TARGET, few, labels=tmp_path / "classes.npy")
    with pytest.raises(QCompilerError, match="takes --activations int8 or int16"):
        search(DIGITS, TARGET, replace(few, formats=WeightRequest(activations="dynamic")))
    quantized = tmp_path / "quantized.onnx"
    ir.save(place(DIGITS, TARGET, few).quantized, quantized)
    with pytest.raises(QCompilerError, match="arrived quantized"):
        search(quantized, TARGET, few)
    with pytest.raises(QCompilerError, match="nothing to choose"):
        search(DIGITS, TARGET, replace(few, keep_float=("conv_0", "conv_2", "conv_5", "gemm_8")))


def test_a_target_of_eight_bit_weights_chooses_what_reads_sixteen_bits_or_floats() -> None:
    options = replace(OPTIONS, samples=16, quality="fast")
    result = search(DIGITS, "arm-npu", options, Budget(minimise="energy"), sweep=False).search
    assert {point.name for point in result.points} == {"int8", result.chosen.name}
    assert {row.format for layer in result.layers for row in layer.formats} == {
        "int8", "int16", "int16*int8", "float16", "float",
    }  # fmt: skip
    assert result.chosen.cost.energy <= result.point("int8").cost.energy


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as leaving:
            cli.main([*arguments])
        return int(leaving.value.code or 0), capsys.readouterr().out

    common = (str(DIGITS), "-t", TARGET, "-c", str(CALIBRATION), "--samples", "16", "--quality", "fast")
    folder, bundle, some = tmp_path / "front", tmp_path / "searched.qc", tmp_path / "some.npz"
    with np.load(TEST) as data:
        images, labels = data["image"][::9], data["label"][::9]
    np.savez(some, image=images, label=labels)
    code, out = run(
        "search", *common, "--evaluate", str(some), "--max-drop", "1%", "--min-weights", "--save", str(folder), "-o",
        str(bundle),
    )  # fmt: skip
    assert code == 0 and "Spearman" in out and "× int8" in out and str(folder / FORMATS) in out
    searched = load(bundle)
    top1 = (searched.run({"image": images})["logits"].argmax(axis=1) == labels).mean()
    shown = json.loads((folder / FRONT_JSON).read_text())
    assert top1 == pytest.approx(shown["chosen"]["measured"]["top1"], abs=0.021)  # one image
    # The file of formats, and a budget without a search of its own, lead to the same.
    for extra in (("--formats", str(folder / FORMATS)), ("--max-drop", "1%", "--min-weights")):
        again = tmp_path / f"{extra[0]}.qc"
        assert run(*common, *extra, "-o", str(again))[0] == 0
        assert (again / "model.int.onnx").read_bytes() == (bundle / "model.int.onnx").read_bytes()
    code, out = run("explain", str(DIGITS), "-t", TARGET, "--formats", str(folder / FORMATS), "--json")
    precisions = {row["layer"]: row["precision"] for row in json.loads(out)["placements"]}
    assert all(precisions[layer] != "int8*int8" for layer in shown["chosen"]["formats"])
    code, out = run("explain", str(DIGITS), "-t", "arm-npu", "--formats", str(folder / FORMATS), "--json")
    assert code == 2 and "arm-npu has no" in json.loads(out)["error"]
    for arguments, said in (
        (("--formats", str(folder / FRONT_JSON)), "is no file of formats"),
        (("--formats", str(tmp_path / "none")), "No such file"),
        (("--formats", str(folder / FORMATS), "--weights", "int4"), "says all formats"),
        (("--weights", "int4", "--max-drop", "1%"), "leave out --weights"),
        (("--min-energy", "--min-latency"), "exclude each other"),
        (("--max-weights", "1B"), "The nearest has"),
    ):
        code, out = run(*common, *arguments, "-o", str(tmp_path / "never.qc"), "--json")
        assert code == 2 and said in json.loads(out)["error"], arguments
    assert not (tmp_path / "never.qc").exists()

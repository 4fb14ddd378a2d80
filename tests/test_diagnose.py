"""Planted trouble is found in the layer it was planted in, with its cause; the measures are what onnxruntime gives."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest

from qcompiler.cli import main
from qcompiler.compile import place, prepare
from qcompiler.diagnose import debug, units_of
from qcompiler.diagnose_causes import Measured, Statistics, explain_noise
from qcompiler.diagnose_report import Diagnosis, render
from qcompiler.errors import QCompilerError
from qcompiler.integer.reference import execute
from qcompiler.options import Options
from qcompiler.pipeline import Dumper
from qcompiler.quant.quantize import quantize
from qcompiler.quant.types import RangeMethod, WeightRequest, WideType
from qcompiler.selfcheck import sqnr

SHAPE = (1, 4, 12, 12)
COUNT = 6
Net = tuple[Path, dict[str, np.ndarray]]


def save(folder: Path, text: str, weights: dict[str, np.ndarray]) -> Path:
    """A model of ONNX text, its nodes named after what they make."""
    graph = onnx.parser.parse_graph(text)
    for node in graph.node:
        node.name = node.output[0]
    graph.initializer.extend(
        onnx.numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "net.onnx")
    return folder / "net.onnx"


def random_weights(*names: str, seed: int = 5) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(size=(8 if name != "last" else 4, 8 if name != "first" else 4, 1, 1)) / 3 for name in names
    }


def inputs(seed: int = 3) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).normal(size=(COUNT, *SHAPE[1:])).astype(np.float32)}


CHAIN = (
    "g (float[1,4,12,12] x) => (float[1,4,12,12] y)"
    "{ a = Conv(x, first)  ra = Relu(a)  b = Conv(ra, middle)  rb = Relu(b)  y = Conv(rb, last) }"
)


@pytest.fixture
def plain(tmp_path: Path) -> Net:
    return save(tmp_path, CHAIN, random_weights("first", "middle", "last")), inputs()


def worst(diagnosis: Diagnosis) -> tuple[str, str]:
    finding = diagnosis.findings[0]
    return finding.layer, finding.cause


def test_nothing_is_wrong_with_a_plain_net(plain: Net) -> None:
    diagnosis = debug(plain[0], options=Options(calibration=plain[1]))
    assert [layer.layer for layer in diagnosis.layers] == ["x", "a + ra", "b + rb", "y"]
    assert {finding.cause for finding in diagnosis.findings} == {"rounding"}
    assert sum(layer.share for layer in diagnosis.layers) == pytest.approx(1)
    assert diagnosis.sqnr is not None and diagnosis.sqnr > 25 and not diagnosis.synthetic


def test_a_planted_channel_is_named(tmp_path: Path) -> None:
    weights = random_weights("first", "middle", "last")
    weights["middle"][3] *= 60
    weights["last"][:, 3] /= 60
    diagnosis = debug(save(tmp_path, CHAIN, weights), options=Options(calibration=inputs()))
    assert worst(diagnosis) == ("b + rb", "channel imbalance")
    finding = diagnosis.findings[0]
    assert "channel 3" in finding.evidence and "--float 'b + rb' --float 'y'" in finding.advice
    assert diagnosis.sqnr is not None and finding.sqnr_without is not None
    assert finding.share > 0.6 and finding.sqnr_without > diagnosis.sqnr + 5
    # What is said of the advice is what following it gives.
    mended = debug(tmp_path / "net.onnx", options=Options(calibration=inputs(), keep_float=["b + rb", "y"]))
    assert mended.sqnr == finding.sqnr_without
    assert "--layer-activations 'y=int16'" in finding.advice
    widened = options_with({"y": "int16"})
    assert debug(tmp_path / "net.onnx", options=widened).sqnr == finding.sqnr_wide
    assert finding.sqnr_wide is not None and finding.sqnr_wide > diagnosis.sqnr + 5


def options_with(reads: dict[str, WideType], method: RangeMethod = "mse") -> Options:
    return Options(calibration=inputs(), formats=WeightRequest(activations_by_layer=reads), method=method)


def gain(before: Diagnosis, after: Diagnosis) -> float:
    """How much better a model has become by following advice, in dB."""
    assert before.sqnr is not None and after.sqnr is not None
    return after.sqnr - before.sqnr


def test_a_planted_outlier_is_named(tmp_path: Path) -> None:
    text = (
        "g (float[1,4,12,12] x) => (float[1,8,12,12] y)"
        "{ a = Conv(x, first)  p = Mul(a, a)  b = Conv(p, middle)  y = Sigmoid(b) }"
    )
    weights = {"first": np.eye(8, 4)[:, :, None, None] + 0.05, **random_weights("middle")}
    data = inputs()
    data["x"] = np.clip(data["x"], -2.5, 2.5)
    # Five times the largest value: not much for `a`, but `p` squares it.
    data["x"][:, 0, 4, 4] = 7.5
    diagnosis = debug(save(tmp_path, text, weights), options=Options(calibration=data, method="minmax"))
    by_layer = {finding.layer: finding for finding in diagnosis.findings}
    assert by_layer["p"].cause == "range outlier" and "--method mse" in by_layer["p"].advice
    # The advice holds.
    others = (
        Options(calibration=data, method="minmax", keep_float=["p", "b"]),
        Options(calibration=data, method="minmax", formats=WeightRequest(activations_by_layer={"b": "int16"})),
    )
    assert "--layer-activations 'b=int16'" in by_layer["p"].advice
    assert all(gain(diagnosis, debug(tmp_path / "net.onnx", options=other)) > 1 for other in others)


def test_a_small_tensor_in_a_concat_with_a_large_one(tmp_path: Path) -> None:
    text = (
        "g (float[1,4,12,12] x) => (float[1,4,12,12] y)"
        "{ small = Conv(x, first)  large = Conv(x, big)  c = Concat<axis = 1>(small, large)  y = Conv(c, mix) }"
    )
    rng = np.random.default_rng(4)
    mix = rng.normal(size=(4, 16, 1, 1))
    mix[:, 8:] /= 50
    weights = random_weights("first") | {"big": rng.normal(size=(8, 4, 1, 1)) * 20, "mix": mix}
    diagnosis = debug(save(tmp_path, text, weights), options=Options(calibration=inputs()))
    found = {finding.layer: finding for finding in diagnosis.findings}["small"]
    assert found.cause == "shared scale clash" and "'large'" in found.evidence
    assert "--layer-activations 'y=int16'" in found.advice and found.sqnr_wide is not None
    mended = debug(tmp_path / "net.onnx", options=options_with({"y": "int16"}))
    assert mended.sqnr == found.sqnr_wide and gain(diagnosis, mended) > 3
    assert "--float 'small' --float 'c' --float 'y'" in found.advice
    in_float = Options(calibration=inputs(), keep_float=["small", "c", "y"])
    assert gain(diagnosis, debug(tmp_path / "net.onnx", options=in_float)) > 3


def test_one_scale_for_weights_of_different_size(tmp_path: Path) -> None:
    weights = random_weights("first", "middle", "last")
    weights["middle"][5] *= 40
    model = save(tmp_path, CHAIN, weights)
    per_tensor = ["quantization.weights.per_channel=false"]
    prepared = prepare(model, "arm-npu", Options(calibration=inputs(), overrides=per_tensor), _Silent())
    assert prepared.plan is not None and prepared.ranges is not None
    (unit,) = [unit for unit in units_of(prepared.graph, prepared.plan) if unit.name == "b + rb"]
    # As if all of the noise came from the weights.
    measured = Measured(unit, 10.0, None, Statistics(1, (1, 8, 12, 12)))
    found = explain_noise(measured, ["b + rb"], prepared.plan, prepared.ranges, prepared.target)
    assert found.cause == "channel imbalance" and "output channel 5" in found.evidence
    assert "--quality balanced" in found.advice and "--float 'b + rb'" in found.advice
    options = Options(calibration=inputs(), overrides=per_tensor)
    advised = (options, replace(options, quality="balanced"), replace(options, keep_float=["b + rb"]))
    plain, balanced, floated = (debug(model, options=each) for each in advised)
    assert gain(plain, balanced) > 2 and gain(plain, floated) > 1


def test_codes_that_a_symmetric_format_wastes(plain: Net) -> None:
    diagnosis = debug(
        plain[0], options=Options(calibration=plain[1], overrides=["quantization.activations.symmetric=true"])
    )
    causes = {finding.layer: finding for finding in diagnosis.findings}
    assert causes["b + rb"].cause == "zero-point clash"
    assert "symmetric" in causes["b + rb"].evidence
    # A target with asymmetric activations, or 16 bits for what reads it.
    assert "a target with asymmetric activations" in causes["b + rb"].advice
    assert gain(diagnosis, debug(plain[0], options=Options(calibration=plain[1]))) > 1
    wide = causes["b + rb"].sqnr_wide
    assert wide is not None and diagnosis.sqnr is not None and wide > diagnosis.sqnr + 0.5


def test_weights_of_four_bits(plain: Net) -> None:
    diagnosis = debug(plain[0], "systolic-npu", Options(calibration=plain[1], formats=WeightRequest("int4")))
    assert worst(diagnosis) == ("b + rb", "few bits")
    finding = diagnosis.findings[0]
    mended = debug(
        plain[0],
        "systolic-npu",
        options=Options(calibration=plain[1], formats=WeightRequest("int4", {"b + rb": "int8"})),
    )
    assert "--layer-weights 'b + rb=int8'" in finding.advice
    assert mended.sqnr is not None and diagnosis.sqnr is not None and mended.sqnr > diagnosis.sqnr + 3


@pytest.mark.parametrize("planted", ["bias", "sum"])
def test_accumulators_that_do_not_hold_what_may_come(tmp_path: Path, planted: str) -> None:
    shape, weights = (4, 4, 1, 1), {"w": np.full((4, 4, 1, 1), 1e-5), "bias": np.array([0, 0, 90.0, 0])}
    if planted == "sum":
        shape, weights = (1, 200_000), {"w": np.ones((200_000, 4)), "bias": np.zeros(4)}
    text = (
        "g (float[1,4,12,12] x) => (float[1,4,12,12] y) { y = Conv(x, w, bias) }"
        if planted == "bias"
        else "g (float[1,200000] x) => (float[1,4] y) { y = Gemm(x, w, bias) }"
    )
    data = inputs() if planted == "bias" else {"x": np.random.default_rng(1).normal(size=(2, *shape[1:])).astype("f")}
    model = save(tmp_path, text, weights)
    prepared = prepare(model, "arm-npu", Options(calibration=data), _Silent())
    assert prepared.plan is not None and prepared.ranges is not None
    unit = units_of(prepared.graph, prepared.plan)[-1]
    statistics = Statistics(1, tuple(unit.output.shape or ()))  # pyright: ignore[reportArgumentType]
    found = explain_noise(Measured(unit, 1.0, None, statistics), ["y"], prepared.plan, prepared.ranges, prepared.target)
    assert found.cause == "saturating accumulator"
    assert ("channel 2" in found.evidence) if planted == "bias" else ("32 bits" in found.evidence)


class _Silent:
    def stage(self, name: str) -> None:
        return None

    def advance(self, done: int, total: int) -> None:
        return None


def test_measures_agree_with_onnxruntime(plain: Net, tmp_path: Path) -> None:
    model, data = plain
    diagnosis = debug(model, options=Options(calibration=data))
    prepared = prepare(model, "arm-npu", Options(calibration=data), _Silent(), Dumper(tmp_path / "dump"))
    assert prepared.plan is not None
    everything = quantize(prepared.graph, prepared.plan)
    file = Dumper(tmp_path / "quantized").dump(everything, "all")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    exact, rounded = (ort.InferenceSession(str(path), options) for path in (model, file))
    signal = noise = 0.0
    for sample in data["x"]:
        wanted, got = (np.asarray(session.run(["y"], {"x": sample[None]})[0]) for session in (exact, rounded))
        signal, noise = signal + float(np.sum(wanted.astype("d") ** 2)), noise + float(np.sum((wanted - got) ** 2.0))
    expected = sqnr(signal, noise)
    assert diagnosis.sqnr == pytest.approx(expected, abs=0.05)
    # With everything up to the last layer quantized, its output is the model's.
    assert diagnosis.layers[-1].so_far == pytest.approx(expected, abs=0.05)


def test_a_softmax_has_no_outliers(tmp_path: Path) -> None:
    text = "g (float[1,4,12,12] x) => (float[1,4,12,12] y) { a = Conv(x, sharp)  y = Softmax<axis = 1>(a) }"
    weights = {"sharp": random_weights("last")["last"][:, :4] * 12}
    diagnosis = debug(save(tmp_path, text, weights), options=Options(calibration=inputs()))
    (row,) = [layer for layer in diagnosis.layers if layer.layer == "y"]
    assert row.op == "Softmax" and row.alone is not None
    assert all(finding.cause == "rounding" for finding in diagnosis.findings if finding.layer == "y")


def test_a_clipped_range(plain: Net) -> None:
    """The ranges of quiet samples do not hold what loud ones bring."""
    model, quiet = plain
    prepared = prepare(model, "arm-npu", Options(calibration=quiet), _Silent())
    assert prepared.plan is not None and prepared.ranges is not None
    unit = units_of(prepared.graph, prepared.plan)[1]
    weights = onnx.numpy_helper.to_array(onnx.load(model).graph.initializer[0])
    loud = np.maximum(np.einsum("oi,nihw->nohw", weights[:, :, 0, 0], 4 * quiet["x"]), 0)
    statistics = Statistics(1, loud.shape)
    statistics.add(loud)
    measured = Measured(unit, None, 10.0, statistics)
    found = explain_noise(measured, ["a + ra"], prepared.plan, prepared.ranges, prepared.target)
    assert found.cause == "clipped range" and "--method minmax" in found.advice
    assert f"{loud.max():.3g}" in found.evidence


def test_a_clipped_range_of_a_method_that_averages(plain: Net) -> None:
    """One loud sample among quiet ones: the average of their extremes cuts it off."""
    model, data = plain
    uneven = {"x": np.concatenate([data["x"], 3 * data["x"][:2]])}
    diagnosis = debug(model, options=Options(calibration=uneven, method="moving_average"))
    clipped = [finding for finding in diagnosis.findings if finding.cause == "clipped range"]
    assert clipped and all("--method minmax" in finding.advice for finding in clipped)
    assert gain(diagnosis, debug(model, options=Options(calibration=uneven, method="minmax"))) > 3


def test_an_accumulator_that_does_overflow(tmp_path: Path) -> None:
    """Sums of what is all positive wrap; what the advice names, the layer in float, does not."""
    text = "g (float[1,70000] x) => (float[1,4] y) { y = Gemm(x, w, bias) }"
    weights = {"w": np.full((70_000, 4), 0.9), "bias": np.zeros(4)}
    weights["w"][:, 1] = 0.001
    data = {"x": np.random.default_rng(1).uniform(0.9, 1, (4, 70_000)).astype(np.float32)}
    model = save(tmp_path, text, weights)
    diagnosis = debug(model, "systolic-npu", Options(calibration=data))
    by_layer = {finding.layer: finding for finding in diagnosis.findings}
    assert by_layer["y"].cause == "saturating accumulator" and "--float 'y'" in by_layer["y"].advice
    wanted = data["x"][:1] @ weights["w"].astype(np.float32)
    errors: list[float] = []
    for kept in ([], ["y"]):
        done = place(model, "systolic-npu", Options(calibration=data, keep_float=kept))
        got = execute(done.integer, {"x": data["x"][:1]})["y"]
        errors.append(float(np.abs(got - wanted).max() / np.abs(wanted).max()))
    assert errors[0] > 0.5 and errors[1] < 0.01


def test_four_bits_in_groups_help(tmp_path: Path) -> None:
    """Input channels of very different size, which a scale for a few of them each suits."""
    text = (
        "g (float[1,4,12,12] x) => (float[1,4,12,12] y){ a = Conv(x, first)  b = Conv(a, middle)  y = Conv(b, last) }"
    )
    rng = np.random.default_rng(2)
    size = np.repeat([1.0, 0.05, 0.3, 0.01], 16)
    weights = {
        "first": rng.normal(size=(64, 4, 1, 1)) / size[:, None, None, None], "last": rng.normal(size=(4, 8, 1, 1)),
        "middle": rng.normal(size=(8, 64, 1, 1)) * size[None, :, None, None],
    }  # fmt: skip
    model, four = save(tmp_path, text, weights), WeightRequest("int4")
    diagnosis = debug(model, "systolic-npu", Options(calibration=inputs(), formats=four))
    found = next(finding for finding in diagnosis.findings if finding.layer == "b")
    assert found.cause == "few bits" and "--layer-weights 'b=int4/32'" in found.advice
    mended = debug(model, "systolic-npu", Options(calibration=inputs(), formats=replace(four, groups={"b": 16})))
    assert gain(diagnosis, mended) > 3
    assert next(layer for layer in mended.layers if layer.layer == "b").weights == "int4/16"


def test_layers_kept_in_float_are_not_measured(plain: Net) -> None:
    diagnosis = debug(plain[0], options=Options(calibration=plain[1], keep_float=["b"]))
    assert diagnosis.kept_float == dict.fromkeys(("b", "rb"), "kept in float on request")
    # What `b` gets from quantized layers is rounded by them, what `y` reads of it on the way in.
    assert [layer.layer for layer in diagnosis.layers] == ["x", "a + ra", "rb", "y"]
    assert [layer.op for layer in diagnosis.layers] == ["input", "Conv", "input", "Conv"]


def test_the_command(plain: Net, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "data.npz", **plain[1])  # pyright: ignore[reportArgumentType]
    for arguments in ([], ["--json"]):
        with pytest.raises(SystemExit) as leaving:
            main(["debug", str(plain[0]), "-c", str(tmp_path / "data.npz"), *arguments])
        assert leaving.value.code in (0, None)
        printed = capsys.readouterr().out
        if arguments:
            assert json.loads(printed)["layers"][1]["layer"] == "a + ra"
        else:
            assert "What helps" in printed and "a + ra" in printed


def test_a_quantized_model_is_refused(plain: Net, tmp_path: Path) -> None:
    prepared = prepare(plain[0], "arm-npu", Options(calibration=plain[1]), _Silent())
    assert prepared.plan is not None
    file = Dumper(tmp_path / "quantized").dump(quantize(prepared.graph, prepared.plan), "all")
    with pytest.raises(QCompilerError, match="arrived quantized"):
        debug(file)


def test_random_inputs_are_said_to_be(plain: Net) -> None:
    from rich.console import Console

    diagnosis = debug(plain[0])
    assert diagnosis.synthetic
    console = Console(width=150)
    with console.capture() as captured:
        console.print(render(diagnosis))
    assert "synthetic random inputs" in captured.get()

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from typer.testing import CliRunner

from qcompiler import cli
from qcompiler.calibrate import calibrate
from qcompiler.graph import const_of
from qcompiler.quant.moments import collect
from qcompiler.quant.plan import plan as make_plan
from qcompiler.quant.quantize import quantize
from qcompiler.quant.repair import EFFORTS, Effort, change_if_better, equalizers, output_errors, repair, uncorrected
from qcompiler.target_loader import load_target

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def _errors(model, data, *plans):
    return output_errors(model, [quantize(model, each) for each in plans], list(data))


@pytest.mark.parametrize("steps", [("gptq",), ("adaround",), ("bias",), ("scales", "gptq", "feedback", "bias")])
def test_each_step_lowers_the_output_error_of_4_bit_weights(four_bits, samples, steps):
    model, plan, data = four_bits
    repaired = repair(model, plan, data, Effort(steps, 60, 8))
    before, after = _errors(model, samples(model, 16, seed=9), plan, repaired)  # samples not seen before
    assert repaired is not plan and after < before


def test_more_effort_gives_less_error(four_bits, samples):
    model, plan, data = four_bits
    plans = [repair(model, plan, data, EFFORTS[quality]) for quality in ("fast", "balanced", "best")]
    fast, balanced, best = _errors(model, samples(model, 16, seed=9), *plans)
    assert plans[0] is plan and balanced < 0.6 * fast and best < 0.4 * fast


def test_the_repaired_integers_are_what_is_stored(four_bits):
    model, plan, data = four_bits
    repaired = repair(model, plan, data, EFFORTS["balanced"])
    stored = quantize(model, repaired).graph.initializers
    assert set(repaired.rounded) == {"w1", "w2", "w3", "w4"}
    for name, integers in repaired.rounded.items():
        found = const_of(stored[f"{name}_quantized"])
        assert found is not None
        np.testing.assert_array_equal(found.astype(np.int64), integers)
        assert found.dtype == ir.DataType.INT4.numpy()


def test_the_output_mean_of_each_layer_is_restored(four_bits):
    model, plan, data = four_bits
    repaired = repair(model, plan, data, Effort(("bias",), 60, 8))
    nodes = [node for node in model.graph if node.name in plan.biases]
    seen = collect(model, quantize(model, repaired), nodes[1:], data)  # moments of each layer's inputs
    drift = [np.abs(m.mean - m.float_mean).mean() / np.abs(m.float_mean).mean() for m in seen.values()]
    plain = collect(model, quantize(model, replace(plan, bias_shifts={})), nodes[1:], data)
    before = [np.abs(m.mean - m.float_mean).mean() / np.abs(m.float_mean).mean() for m in plain.values()]
    assert np.mean(drift) < 0.5 * np.mean(before)


def test_probabilities_are_compared_by_their_divergence(parse, samples, run):
    text = "g (float[1,8] x) => (float[1,4] p) { y = Gemm(x, w, b) \n p = Softmax(y) }"
    model = parse(text, {"w": (8, 4), "b": (4,)})
    data = samples(model, 6)
    plan = make_plan(model, calibrate(model, data), load_target("x86-cpu"))
    (found,) = output_errors(model, [quantize(model, plan)], list(data))
    expected = []
    for sample in data:
        exact, coarse = (np.maximum(run(each, sample)[0], 1 / 512) for each in (model, quantize(model, plan)))
        expected.append((exact * np.log(exact / coarse) - exact + coarse).sum())
    assert found == pytest.approx(np.mean(expected), rel=1e-3) and found > 0
    assert output_errors(model, [model], list(data)) == [0.0]


def test_nothing_is_learned_from_synthetic_data(four_bits, samples, caplog):
    model, plan, _ = four_bits
    assert repair(model, plan, samples(model, 8, synthetic=True), EFFORTS["best"]) is plan
    assert "without calibration data" in caplog.text


def test_no_time_left_still_gives_a_whole_plan(four_bits):
    model, plan, data = four_bits
    repaired = repair(model, plan, data, replace(EFFORTS["best"], seconds=0.0))
    assert repaired is not plan and len(repaired.rounded) == 4


@pytest.mark.parametrize("spread", [0.0, 2.0])
def test_equalizing_is_kept_where_it_helps(parse, samples, network, spread):
    weights = load_target("systolic-npu").quantization.weights.model_copy(update={"per_channel": False})
    target = load_target("systolic-npu")
    quantization = target.quantization.model_copy(update={"weights": weights})
    target = target.model_copy(update={"quantization": quantization})
    channels = 10.0 ** np.random.default_rng(3).uniform(-spread, spread, (16, 1, 1, 1)).astype(np.float32)
    first = np.random.default_rng(4).standard_normal((16, 3, 3, 3)).astype(np.float32)
    text, shapes = network
    model = parse(text, {**shapes, "w1": channels * first, "b1": np.zeros(16, np.float32)})
    data = samples(model, 16)

    def planned(graph):
        ranges = calibrate(graph, data)
        return ranges, make_plan(graph, ranges, target)

    ranges, plan = planned(model)
    *_, equalize = equalizers(model, data, per_channel=False)
    chosen, _, formats = change_if_better(model, equalize, ranges, plan, planned, data)
    (before,) = _errors(model, data, plan)
    (after,) = _errors(chosen, data, formats)
    assert after <= before
    if spread:
        assert chosen is not model
        assert after < 0.8 * before


def test_outliers_behind_a_normalization_are_migrated(parse, samples):
    gamma = np.ones(16, np.float32)
    gamma[3] = 80.0
    text = """g (float[1,7,16] x) => (float[1,7,8] y) {
        n = Mul(x, gamma)
        s = Add(n, beta)
        y = MatMul(s, w)
    }"""
    model = parse(text, {"gamma": gamma, "beta": (16,), "w": (16, 8)})
    data, target = samples(model, 8), load_target("systolic-npu")

    def planned(graph):
        ranges = calibrate(graph, data, "minmax")
        return ranges, make_plan(graph, ranges, target)

    ranges, plan = planned(model)
    *_, migrate = equalizers(model, data, per_channel=True)
    chosen, _, formats = change_if_better(model, migrate, ranges, plan, planned, data)
    (before,), (after,) = _errors(model, data, plan), _errors(chosen, data, formats)
    assert chosen is not model and after < before


# --- leaving techniques out ---------------------------------------------------------------------------------


def test_an_effort_leaves_techniques_out():
    effort = EFFORTS["best"].without(("gptq", "tune"))
    assert effort.steps == ("scales", "adaround", "feedback", "bias") and effort.tuning_seconds == 0
    assert effort.otherwise is not None and effort.otherwise.steps == ("scales", "bias")
    assert EFFORTS["best"].without(()) == EFFORTS["best"]


def test_passes_are_left_out(parse, samples, network):
    model = parse(*network)
    data = samples(model, 4)
    (equalize,) = equalizers(model, data, per_channel=False, without=("absorb",))
    assert type(equalize).__name__ == "EqualizeLayers"
    assert equalizers(model, data, per_channel=False, without=("absorb", "equalize")) == []
    product = parse("g (float[1,7,16] x) => (float[1,7,8] y) { y = MatMul(x, w) }", {"w": (16, 8)})
    assert len(equalizers(product, samples(product, 2), per_channel=True)) == 1
    assert equalizers(product, samples(product, 2), per_channel=True, without=("migrate",)) == []


@pytest.mark.parametrize("bias", ["", ", b1"])
def test_without_corrections_biases_are_the_models_own(parse, samples, run, bias):
    text = f"g (float[1,3,8,8] x) => (float[1,16,6,6] y) {{ y = Conv(x, w1{bias}) }}"
    model = parse(text, {"w1": (16, 3, 3, 3), "b1": (16,)})
    data = samples(model, 4)
    plan = make_plan(model, calibrate(model, data), load_target("systolic-npu"))
    bare = uncorrected(model, plan)
    assert plan.bias_shifts and not bare.bias_shifts
    assert set(bare.biases) == ({"y"} if bias else set())
    (sample, *_) = data
    (found,), (exact,) = run(quantize(model, bare), sample), run(model, sample)
    assert np.abs(found - exact).max() < 0.05 * np.abs(exact).max()


def test_the_command_line_leaves_a_technique_out(tmp_path):
    arguments = ["quantize", str(EXAMPLES / "digits.onnx"), "-t", "systolic-npu", "--samples", "16",
                 "-c", str(EXAMPLES / "digits_calibration.npz"), "--quality", "balanced"]  # fmt: skip
    written = []
    for name, options in (("all", []), ("less", ["--no-repair", "gptq", "--no-repair", "bias"])):
        path = tmp_path / f"{name}.onnx"
        result = CliRunner().invoke(cli.app, [*arguments, *options, "-o", str(path)])
        assert result.exit_code == 0, result.output
        written.append(path.read_bytes())
    assert written[0] != written[1]
    assert CliRunner().invoke(cli.app, [*arguments, "--no-repair", "magic", "-o", str(path)]).exit_code == 2

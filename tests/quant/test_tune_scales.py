"""Scales and biases of a quantized network, tuned as a whole."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qcompiler.compile import prepare
from qcompiler.finetune.tune_scales import compared_tensors, tune_scales
from qcompiler.graph import const_of, value_name
from qcompiler.options import Options
from qcompiler.quant.quantize import quantize
from qcompiler.quant.repair import EFFORTS, output_errors, repair
from qcompiler.quant.types import Conversion, WeightRequest

TIME = 1e6
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def _errors(model, data, *plans):
    return output_errors(model, [quantize(model, each) for each in plans], list(data))


def _scales(plan):
    return np.concatenate([plan.weights[name].scale.reshape(-1) for name in sorted(plan.rounded)])


# --- without torch ------------------------------------------------------------------------------------------


def test_without_torch_the_plan_stays_and_a_warning_names_the_extra(four_bits, monkeypatch, caplog):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "qcompiler.finetune.tune_scales.find_spec", lambda name: None if name == "torch" else real(name)
    )
    model, plan, data = four_bits
    assert tune_scales(model, plan, data, TIME) is plan
    assert "pip install 'qcompiler[finetune]'" in caplog.text


def test_the_report_says_what_is_left_out_without_torch(monkeypatch):
    monkeypatch.setattr("qcompiler.finetune.tune_scales.find_spec", lambda _: None)
    options = Options(calibration=EXAMPLES / "digits_calibration.npz", samples=16, quality="best")
    prepared = prepare(EXAMPLES / "digits.onnx", "systolic-npu", options)
    assert any("'qcompiler[finetune]'" in warning for warning in prepared.warnings)
    balanced = prepare(EXAMPLES / "digits.onnx", "systolic-npu", replace(options, quality="balanced"))
    assert not any("finetune" in warning for warning in balanced.warnings)


def test_nothing_is_tuned_on_synthetic_data(four_bits, samples, caplog):
    model, plan, _ = four_bits
    assert tune_scales(model, plan, samples(model, 8, synthetic=True), TIME) is plan
    assert not caplog.text


def _grouped(plan):
    blocks = np.ones((24, 1, 1, 1), np.float32)
    fmt = replace(plan.weights["w3"], scale=blocks, zero_point=np.zeros(blocks.shape, np.int8), axis=1, block=16)
    return replace(plan, weights={**plan.weights, "w3": fmt})


def _of_two_widths(plan):
    wide = replace(plan.activations["r"], dtype="int16")
    return replace(plan, conversions={"r": Conversion(wide, frozenset({"d"}))})


@pytest.mark.parametrize("change", [_grouped, _of_two_widths])
def test_groups_and_two_widths_stay_as_repair_left_them(four_bits, change, caplog):
    model, plan, data = four_bits
    given = change(plan)
    assert tune_scales(model, given, data, TIME) is given
    assert "neither weights in groups nor tensors of two widths" in caplog.text


def test_the_best_quality_of_grouped_weights_is_repair_alone():
    formats = WeightRequest("int4", group=8)
    options = Options(calibration=EXAMPLES / "digits_calibration.npz", samples=16, quality="best", formats=formats)
    prepared = prepare(EXAMPLES / "digits.onnx", "systolic-npu", options)
    repaired = prepare(EXAMPLES / "digits.onnx", "systolic-npu", replace(options, without_repair=["tune"]))
    assert any("neither weights in groups nor" in warning for warning in prepared.warnings)
    assert not repaired.warnings
    assert prepared.plan is not None and repaired.plan is not None
    assert prepared.plan.weights["conv_5.weight"].block == 8 and set(prepared.plan.rounded) == set(
        repaired.plan.rounded
    )
    for name, integers in repaired.plan.rounded.items():
        np.testing.assert_array_equal(prepared.plan.rounded[name], integers)
        np.testing.assert_array_equal(prepared.plan.weights[name].scale, repaired.plan.weights[name].scale)


def test_tensors_are_compared_where_they_are_rounded(four_bits):
    model, plan, _ = four_bits
    assert compared_tensors(model.graph, plan) == ["r", "s", "t", "m", "y"]


def test_of_a_softmax_the_input_is_compared(parse, four_bits):
    model = parse(
        "g (float[1,4] x) => (float[1,5] p) { y = Gemm(x, w, b) \n p = Softmax(y) }", {"w": (4, 5), "b": (5,)}
    )
    _, plan, _ = four_bits
    fmt = plan.activations["x"]
    planned = replace(plan, activations={"x": fmt, "y": fmt, "p": fmt})
    assert compared_tensors(model.graph, planned) == ["y"]
    assert compared_tensors(model.graph, replace(planned, activations={"x": fmt})) == []


# --- with torch ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def repaired(four_bits):
    pytest.importorskip("torch")
    model, plan, data = four_bits
    return model, repair(model, plan, data, EFFORTS["balanced"]), data


@pytest.fixture(scope="module")
def tuned(repaired):
    model, plan, data = repaired
    return tune_scales(model, plan, data, TIME, variants=1)


def test_the_network_comes_closer_on_samples_not_seen(repaired, tuned, samples):
    model, plan, _ = repaired
    before, after = _errors(model, samples(model, 16, seed=9), plan, tuned)
    assert after < 0.95 * before


def test_integers_stay_and_scales_and_biases_change(repaired, tuned):
    model, plan, _ = repaired
    assert set(tuned.rounded) == set(plan.rounded)
    for name, integers in plan.rounded.items():
        np.testing.assert_array_equal(tuned.rounded[name], integers)
    assert not np.allclose(_scales(tuned), _scales(plan), rtol=1e-3)
    for name, shift in plan.bias_shifts.items():
        assert not np.allclose(tuned.bias_shifts[name], shift, rtol=1e-3)
    for node in model.graph:
        if node.name in tuned.biases:
            product = (
                tuned.activations[value_name(node.inputs[0])].scale * tuned.weights[value_name(node.inputs[1])].scale
            )
            np.testing.assert_array_equal(tuned.biases[node.name].scale, product)


def test_weights_without_chosen_integers_get_the_nearest(four_bits):
    pytest.importorskip("torch")
    model, plan, data = four_bits
    tuned = tune_scales(model, plan, data, TIME)
    plain, found = quantize(model, plan), quantize(model, tuned)
    for name in ("w1", "w2", "w3", "w4"):
        before, after = (const_of(each.graph.initializers[f"{name}_quantized"]) for each in (plain, found))
        np.testing.assert_array_equal(before, after)
    before, after = _errors(model, data, plan, tuned)
    assert after < before


def test_the_trained_network_computes_what_the_quantized_model_does(repaired, samples, run):
    torch = pytest.importorskip("torch")
    from qcompiler.finetune.network import Network
    from qcompiler.quant.dynamic import shift_bias

    model, plan, _ = repaired
    shifted = model.clone()
    for node in shifted.graph:
        if node.name in plan.bias_shifts:
            shift_bias(node, plan.bias_shifts[node.name])
    network = Network(shifted.graph, replace(plan, bias_shifts={}))
    step = float(plan.activations["y"].scale)
    off = []
    for sample in samples(model, 8, seed=3):
        (expected,) = run(quantize(model, plan), sample)
        found = network({name: torch.from_numpy(array)[None] for name, array in sample.items()})["y"][0]
        off.append(np.abs(found.detach().numpy() - expected) / step)
    # Sums in another order may round to the neighbouring integer.
    assert np.max(off) < 1.01 and np.mean(off) < 0.25


def test_a_seed_decides(repaired, monkeypatch):
    model, plan, data = repaired
    monkeypatch.setattr("qcompiler.finetune.tune_scales.closest", lambda model, plans, samples: plans[-1])
    tuned, again, other = (tune_scales(model, plan, data, TIME, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(_scales(tuned), _scales(again))
    for name, shift in tuned.bias_shifts.items():
        np.testing.assert_array_equal(shift, again.bias_shifts[name])
    assert not np.array_equal(_scales(tuned), _scales(other))


def test_powers_of_two_stay(four_bits, samples):
    pytest.importorskip("torch")
    model, plan, data = four_bits

    def up(formats):
        return {name: replace(fmt, scale=2 ** np.ceil(np.log2(fmt.scale))) for name, fmt in formats.items()}

    shifting = replace(plan, activations=up(plan.activations), weights=up(plan.weights), biases=up(plan.biases))
    tuned = tune_scales(model, shifting, data, TIME, power_of_two=True)
    for name, fmt in shifting.weights.items():
        np.testing.assert_array_equal(tuned.weights[name].scale, fmt.scale)
    before, after = _errors(model, samples(model, 16, seed=9), shifting, tuned)
    assert after < before


def test_without_time_there_is_one_epoch(repaired):
    model, plan, data = repaired
    from qcompiler.finetune.scale_training import EPOCHS

    steps = []
    tune_scales(model, plan, data, 0.0, progress=lambda done, total: steps.append((done, total)))
    assert len(steps) == 1  # 24 samples learned from, in batches of at least 16
    assert steps[-1] == (1, EPOCHS)


def test_variants_make_more_samples_but_not_more_than_the_steps_there_are(repaired, monkeypatch):
    model, plan, data = repaired
    monkeypatch.setattr("qcompiler.finetune.scale_training.STEPS", 50)
    counts = []
    for variants in (0, 3):
        steps = []
        tune_scales(
            model, plan, data, TIME, variants=variants, progress=lambda done, total, to=steps: to.append((done, total))
        )
        assert steps[-1][0] == steps[-1][1] == len(steps)
        counts.append(len(steps))
    # 24 samples learned from make one step an epoch, 96 make six.
    assert counts == [40, 50]


def test_an_unknown_operator_is_named(parse, four_bits, caplog):
    pytest.importorskip("torch")
    _, plan, data = four_bits
    text = """g (float[1,3,16,16] x) => (float[1,16,16,16] y) {
        a = Conv<pads=[1,1,1,1]>(x, w1, b1)
        y = Selu(a)
    }"""
    model = parse(text, {"w1": (16, 3, 3, 3), "b1": (16,)})
    planned = replace(plan, float_nodes={"y": "in float"})
    planned = replace(planned, activations={"x": plan.activations["x"], "a": plan.activations["r"]})
    assert tune_scales(model, planned, data, TIME) is planned
    assert "Selu" in caplog.text and "tuning scales" in caplog.text

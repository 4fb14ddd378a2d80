"""Which weights get four bits, and that QDQ models with them mean the same to onnxruntime as to us."""

import numpy as np
import pytest

from qcompiler.calibrate import calibrate
from qcompiler.errors import QCompilerError
from qcompiler.graph import QCOMPILER_DOMAIN
from qcompiler.integer.realize import realize
from qcompiler.integer.reference import execute
from qcompiler.quant.plan import plan
from qcompiler.quant.quantize import quantize
from qcompiler.quant.types import WeightRequest
from qcompiler.target_loader import load_target

TEXT = (
    "g (float[1,3,12,11] x) => (y) { a = Conv<pads=[1,1,1,1]>(x, w1, b1)  r = Relu(a)"
    "  d = Conv<group=10, pads=[1,1,1,1]>(r, w2)  c = Conv<pads=[1,1,1,1]>(d, w3, b3)  s = Add(c, r)"
    "  f = Reshape(s, shape)  h = Gemm<transB=1>(f, w4)  q = Relu(h)  y = Gemm<transB=1>(q, w5) }"
)
CONSTANTS = {
    "w1": (10, 3, 3, 3), "b1": (10,), "w2": (10, 1, 3, 3), "w3": (10, 10, 3, 3), "b3": (10,), "w4": (7, 1320),
    "w5": (5, 7), "shape": np.array([1, 1320]),
}  # fmt: skip
FOUR = WeightRequest("int4")


@pytest.fixture
def planned(parse, samples):
    def run(request, target="x86-cpu", text=TEXT):
        model = parse(text, CONSTANTS)
        target = load_target(target) if isinstance(target, str) else target
        return model, plan(model, calibrate(model, samples(model, 8)), target, weights=request)

    return run


def _dtypes(made):
    return {name: fmt.dtype for name, fmt in made.weights.items()}


@pytest.mark.parametrize("target", ["x86-cpu", "systolic-npu"])
def test_first_and_last_layer_keep_eight_bits(planned, target):
    _, made = planned(FOUR, target)
    assert _dtypes(made) == {"w1": "int8", "w2": "int4", "w3": "int4", "w4": "int4", "w5": "int8"}
    assert all(fmt.per_channel and not fmt.zero_point.any() for fmt in made.weights.values())


def test_single_layers_may_differ(planned):
    _, made = planned(WeightRequest("int4", {"a": "int4", "c": "int8"}))
    assert _dtypes(made) == {"w1": "int4", "w2": "int4", "w3": "int8", "w4": "int4", "w5": "int8"}
    _, made = planned(WeightRequest("int8", {"c": "int4"}))
    assert [name for name, dtype in _dtypes(made).items() if dtype == "int4"] == ["w3"]


def test_weights_of_two_layers_have_four_bits_only_if_both_want_them(planned):
    text = TEXT.replace("w2)  c = Conv<pads=[1,1,1,1]>(d, w3, b3)", "w2)  e = Conv<pads=[1,1,1,1]>(d, w3)"
                        "  c = Conv<pads=[1,1,1,1]>(e, w3, b3)")  # fmt: skip
    _, made = planned(WeightRequest("int4", {"e": "int8"}), text=text)
    assert _dtypes(made)["w3"] == "int8"
    _, made = planned(FOUR, text=text)
    assert _dtypes(made)["w3"] == "int4"


def test_layers_the_accelerator_takes_in_eight_bits_only_keep_them(planned):
    target = load_target("systolic-npu")
    assert target.npu is not None
    rules = tuple(
        rule.model_copy(update={"precisions": ("int8*int8",)}) if rule.engine == "vpu" and "Conv" in rule.ops else rule
        for rule in target.npu.rules
    )
    target = target.model_copy(update={"npu": target.npu.model_copy(update={"rules": rules})})
    _, made = planned(FOUR, target)
    assert _dtypes(made)["w2"] == "int8" and _dtypes(made)["w3"] == "int4"


def test_refusals(planned):
    with pytest.raises(QCompilerError, match="arm-npu has no int4 weights: its spec lists int8, uint8"):
        planned(FOUR, "arm-npu")
    with pytest.raises(QCompilerError, match="no int4 weights"):
        planned(WeightRequest("int8", {"c": "int4"}), "arm-npu")
    with pytest.raises(QCompilerError, match="is called 'cc'; did you mean 'c'"):
        planned(WeightRequest("int8", {"cc": "int4"}))


def test_onnxruntime_reads_the_model_as_we_do(planned, run, samples):
    model, made = planned(FOUR)
    quantized = quantize(model, made)
    assert sorted(str(value.dtype) for value in quantized.graph.initializers.values()).count("INT4") == 6
    integer = realize(quantized, load_target("x86-cpu"))
    products = [
        node for node in integer.graph if node.domain == QCOMPILER_DOMAIN and node.op_type in ("QConv", "QGemm")
    ]
    stored = [str(node.inputs[1].dtype) for node in products if node.inputs[1] is not None]
    assert stored == ["INT8", "INT4", "INT4", "INT4", "INT8"]
    for feeds in samples(model, 4, seed=3):
        (theirs,), (ours,) = run(quantized, feeds), execute(integer, feeds).values()
        step = float(made.activations["y"].scale)
        # onnxruntime computes in float: an integer may fall to the other side of a tie.
        assert np.abs(theirs - ours).max() <= 1.01 * step
        assert np.abs(theirs).max() > 10 * step


def test_four_bits_cost_accuracy_but_not_much(planned, run, samples):
    model, made = planned(FOUR)
    quantized = quantize(model, made)
    noise, signal = [], []
    for feeds in samples(model, 4, seed=4):
        (exact,), (coarse,) = run(model, feeds), run(quantized, feeds)
        noise.append(np.square(exact - coarse).mean())
        signal.append(np.square(exact).mean())
    assert 12 < 10 * np.log10(np.mean(signal) / np.mean(noise)) < 30

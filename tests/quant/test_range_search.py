import numpy as np
import pytest

from qcompiler.calibrate import calibrate
from qcompiler.quant.range_search import search_ranges
from qcompiler.quant.types import Range

NARROW, WIDE = Range(-3.0, 3.0, -40.0, 40.0), Range(-40.0, 40.0, -40.0, 40.0)


@pytest.fixture
def outliers(samples):
    """Samples of a [1, 8, 6, 6] input whose channel 0 reaches 40 where others stay near 1."""

    def make(model):
        data = samples(model, 6)
        for sample in data.arrays:
            sample["x"][:, 0] = 40 * np.sign(sample["x"][:, 0])
        return data

    return make


def _net(parse, weight_of_channel_0):
    weights = np.random.default_rng(0).standard_normal((4, 8, 3, 3)).astype(np.float32)
    weights[:, 0] *= weight_of_channel_0
    text = "g (float[1,8,6,6] x) => (float[1,4,6,6] y) { y = Conv<pads=[1,1,1,1]>(x, w) }"
    return parse(text, {"w": weights})


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_reader_decides_whether_outliers_matter(parse, outliers, symmetric):
    for importance, winner in ((1.0, WIDE), (0.0, NARROW)):
        model = _net(parse, importance)
        found = search_ranges(model, {"x": [NARROW, WIDE]}, outliers(model), 8, symmetric=symmetric)
        assert found == {"x": winner}


def test_without_a_reader_the_tensor_itself_is_judged(parse, outliers):
    model = parse("g (float[1,8,6,6] x) => (float[1,8,6,6] y) { y = Sigmoid(x) }", {})
    assert search_ranges(model, {"x": [NARROW, WIDE]}, outliers(model), 8, symmetric=False) == {"x": WIDE}


def test_auto_is_no_worse_than_any_method_it_chooses_from(parse, outliers, run):
    model = _net(parse, 0.01)
    data = outliers(model)

    def error(method):
        chosen = calibrate(model, data, method).by_name["x"]
        step = (chosen.high - chosen.low) / 255
        total = 0.0
        for sample in data:
            rounded = np.clip(np.rint(sample["x"] / step), np.rint(chosen.low / step), np.rint(chosen.high / step))
            (got,), (want,) = run(model, {"x": (rounded * step).astype(np.float32)}), run(model, sample)
            total += float(np.square(got - want).mean())
        return total

    best = min(error(method) for method in ("minmax", "percentile", "entropy", "mse"))
    assert error("auto") <= 1.001 * best

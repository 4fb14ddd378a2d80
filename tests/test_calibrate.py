import json
import time
from collections.abc import Iterator

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from qcompiler.calibrate import calibrate, observed_values
from qcompiler.errors import QCompilerError
from qcompiler.graph import const_of
from qcompiler.importer import import_onnx
from qcompiler.quant.ranges import HEADROOM
from qcompiler.quant.types import RangeMethod

TEXT = (
    "g (float[1,3,20,20] x) => (y) { c = Conv(x, w)  r = Relu(c)  p = MaxPool<kernel_shape=[2,2]>(r)"
    "  t = Transpose<perm=[0,2,3,1]>(p)  s = Sigmoid(t)  m = Mul(t, s)  y = Softmax(m) }"
)


def _model(text: str = TEXT) -> ir.Model:
    graph = onnx.parser.parse_graph(text)
    weights = np.random.default_rng(0).standard_normal((5, 3, 3, 3)).astype(np.float32)
    if "w" in {name for node in graph.node for name in node.input}:
        graph.initializer.append(onnx.numpy_helper.from_array(weights, "w"))
    for node in graph.node:
        node.name = node.output[0]
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True))


class Data:
    """Samples made on the fly, so that none can be kept."""

    def __init__(
        self, count: int, *, spread: float = 1.0, synthetic: bool = False, bad: dict[int, float] | None = None
    ):
        self.count, self.spread, self.synthetic, self.bad = count, spread, synthetic, bad or {}

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for index in range(self.count):
            x = self.spread * np.random.default_rng(index).standard_normal((1, 3, 20, 20)).astype(np.float32)
            if index in self.bad:
                x[0, 1, 2, 3] = self.bad[index]
            yield {"x": x.astype(np.float32)}


def test_only_tensors_with_a_format_of_their_own_are_observed():
    # c lies before a fused Relu, s inside a table; p and t repeat r.
    assert [value.name for value in observed_values(_model())] == ["x", "r", "m", "y"]


def test_minimum_and_maximum_are_those_of_the_float_model():
    model, data = _model(), Data(5)
    ranges = calibrate(model, data, "minmax")
    w = const_of(model.graph.initializers["w"])
    assert w is not None
    x = np.concatenate([sample["x"] for sample in data])
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(2, 3))
    convolved = np.einsum("nchwij,ocij->nohw", windows, w)
    assert ranges.by_name["r"].high == pytest.approx(convolved.max(), rel=1e-5)
    assert ranges.by_name["r"].low == 0
    assert (ranges.by_name["x"].low, ranges.by_name["x"].high) == (x.min(), x.max())
    assert (ranges.samples, ranges.method, ranges.synthetic) == (5, "minmax", False)


def test_mse_stays_inside_what_was_seen_and_clips_outliers():
    data = Data(6, bad={3: 500.0})
    chosen = calibrate(_model(), data, "mse", bits=4).by_name["x"]
    assert chosen.observed_high == 500 and chosen.observed_low <= chosen.low <= 0
    assert chosen.high < 250


def test_symmetric_formats_get_symmetric_ranges():
    chosen = calibrate(_model(), Data(6, bad={3: 500.0}), "mse", bits=4, symmetric=True).by_name["x"]
    assert chosen.high < 500 and chosen.low == pytest.approx(max(chosen.observed_low, -chosen.high))


def test_logits_spend_their_steps_where_probability_is():
    """What lies far below the largest logit of its row has no probability, so that a Softmax's input may clip it."""

    class Logits(Data):
        def __iter__(self):
            for sample in super().__iter__():
                sample["x"][:, 0] += 12
                sample["x"][:, 2] = -40 + sample["x"][:, 2]
                yield sample

    softmax = "{ t = Transpose<perm=[0,2,3,1]>(x)  y = Softmax<axis=3>(t) }"
    chosen = calibrate(_model(f"g (float[1,3,20,20] x) => (y) {softmax}"), Logits(4), "mse").by_name["x"]
    plain = calibrate(_model("g (float[1,3,20,20] x) => (y) { y = Relu(x) }"), Logits(4), "mse").by_name["x"]
    assert plain.low < -38 and chosen.low > -10 and chosen.high == plain.high
    # Another reader needs every value.
    shared = softmax.replace("}", " z = Sigmoid(x) }")
    both = calibrate(_model(f"g (float[1,3,20,20] x) => (y, z) {shared}"), Logits(4), "mse").by_name["x"]
    assert both == plain


@pytest.mark.parametrize("method", ["mse", "auto", "minmax"])
def test_sixteen_bits_have_room_for_larger_values(method: RangeMethod):
    seen = calibrate(_model(), Data(4), "minmax").by_name
    room = 1.0 if method == "minmax" else HEADROOM
    for name, chosen in calibrate(_model(), Data(4), method, bits=16, symmetric=True).by_name.items():
        span = max(-seen[name].low, seen[name].high)
        # Where clipping a little would err less among the values seen, a little goes.
        assert 0.9 * room * span <= max(-chosen.low, chosen.high) <= 1.0001 * room * span
        assert (chosen.observed_low, chosen.observed_high) == (seen[name].low, seen[name].high)


def test_channel_means_feed_the_bias_correction():
    data = Data(4)
    means = calibrate(_model(), data).channel_means
    expected = np.concatenate([sample["x"] for sample in data]).mean(axis=(0, 2, 3), dtype=np.float64)
    assert list(means) == ["c"]
    np.testing.assert_allclose(means["c"], expected, rtol=1e-6)


def test_random_inputs_teach_no_means():
    ranges = calibrate(_model(), Data(4, synthetic=True))
    assert ranges.synthetic and not ranges.channel_means


def test_progress_counts_samples():
    told = []
    calibrate(_model(), Data(3), progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_results_do_not_depend_on_the_order_of_samples():
    class Reversed(Data):
        def __iter__(self):
            return reversed(list(super().__iter__()))

    a, b = calibrate(_model(), Data(5)), calibrate(_model(), Reversed(5))
    assert a.by_name == b.by_name


def test_memory_does_not_grow_with_the_samples(monkeypatch):
    """Statistics are updated in place: what is kept after 3 samples and after 30 has one size."""
    import tracemalloc

    peaks = []
    for count in (3, 30):
        tracemalloc.start()
        calibrate(_model(), Data(count))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_nan_names_the_tensor_and_the_sample():
    model = _model("g (float[1,3,20,20] x) => (y) { l = Log(x)  y = Relu(l) }")
    with pytest.raises(QCompilerError, match=r"sample 0 makes the tensor '\w' NaN"):
        calibrate(model, Data(2))


def test_infinities_are_kept_as_such():
    model = _model("g (float[1,3,20,20] x) => (y) { e = Exp(x)  y = Relu(e) }")
    ranges = calibrate(model, Data(2, bad={1: 1e30}))
    assert ranges.by_name["y"].high == np.inf


def test_no_samples():
    with pytest.raises(QCompilerError, match="no sample"):
        calibrate(_model(), Data(0))


def test_a_model_that_only_moves_data():
    ranges = calibrate(_model("g (float[1,3,20,20] x) => (y) { y = Transpose<perm=[0,2,3,1]>(x) }"), Data(2))
    assert list(ranges.by_name) == ["x"]


def test_a_real_network_calibrates_in_time(zoo):
    """64 images of 128x128 through MobileNet, 3 seconds allowed on the project's two cores."""
    entry = next(
        e for e in json.loads((zoo / "manifest.json").read_text())["models"] if e["name"] == "mobilenet_v1_025_128"
    )
    model = import_onnx(zoo / entry["model"])
    rng = np.random.default_rng(0)
    samples = [{entry["input"]["name"]: rng.uniform(-1, 1, (1, 3, 128, 128)).astype(np.float32)} for _ in range(64)]

    class Images(list):
        synthetic = False

    start = time.perf_counter()
    ranges = calibrate(model, Images(samples))
    assert time.perf_counter() - start < 6  # twice the allowance: the machine may be busy
    assert len(ranges.by_name) > 25 and all(chosen.high <= 6 for name, chosen in ranges.by_name.items() if name == "t1")

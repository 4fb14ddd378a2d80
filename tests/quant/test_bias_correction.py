import numpy as np
import pytest

from qcompiler.quant.bias_correction import bias_shift, input_channel_axis


@pytest.mark.parametrize("group", [1, 2, 6])
def test_the_shift_restores_the_mean_of_a_convolution(parse, run, group):
    rng = np.random.default_rng(group)
    weights = rng.standard_normal((12, 6 // group, 3, 3)).astype(np.float32)
    rounded = (np.rint(weights * 4) / 4).astype(np.float32)
    text = f"g (float[1,6,40,40] x) => (float[1,12,38,38] y) {{ y = Conv<group={group}>(x, w) }}"
    exact, coarse = (parse(text, {"w": w}) for w in (weights, rounded))
    x = rng.uniform(0, 2, (1, 6, 40, 40)).astype(np.float32) * rng.uniform(0.5, 2, (1, 6, 1, 1)).astype(np.float32)
    shift = bias_shift(exact.graph[0], weights, rounded, x.mean(axis=(0, 2, 3), dtype=np.float64))
    before, after = (run(model, {"x": x})[0].mean(axis=(0, 2, 3)) for model in (exact, coarse))
    assert np.abs(after - before).max() > 0.1
    # What is left comes from the border, where a window does not see every input equally often.
    np.testing.assert_allclose(after + shift, before, atol=0.05 * np.abs(after - before).max())


@pytest.mark.parametrize("transposed", [0, 1])
def test_the_shift_restores_the_mean_of_a_matrix_product(parse, transposed):
    rng = np.random.default_rng(transposed)
    weights = rng.standard_normal((4, 7) if transposed else (7, 4)).astype(np.float32)
    rounded = np.rint(weights)
    model = parse(f"g (float[1,7] x) => (float[1,4] y) {{ y = Gemm<transB={transposed}>(x, w) }}", {"w": weights})
    means = rng.uniform(0, 1, 7)
    shift = bias_shift(model.graph[0], weights, rounded, means)
    error = (rounded - weights).T if not transposed else rounded - weights
    np.testing.assert_allclose(shift, -error @ means, rtol=1e-6)


def test_channels_of_inputs(parse):
    model = parse(
        "g (float[1,4,8,8] x, float[2,5,6] m) => (float[1,3,17,17] t, float[2,5,3] p)"
        "{ c = Conv(x, w)  t = ConvTranspose<strides=[2,2], kernel_shape=[3,3]>(c, v)  p = MatMul(m, u) }",
        {"w": (4, 4, 1, 1), "v": (4, 3, 3, 3), "u": (6, 3)},
    )
    assert [input_channel_axis(node) for node in model.graph] == [1, None, 2]

"""Which weights go, and that those that stay make up for them."""

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.dataset import input_specs, load_dataset, synthetic
from qcompiler.errors import QCompilerError
from qcompiler.graph import const_of, data_input
from qcompiler.integer.reference import execute
from qcompiler.integer.sparsity import is_2_of_4
from qcompiler.quant import prune as pruning
from qcompiler.quant.prune import _largest, _two_of_four, prune, refit, sparse_gpt
from qcompiler.quant.rounding import Problem, damped, descend, gptq
from qcompiler.quant.types import PruneRequest

TEXT = (
    "g (float[1,3,10,9] x) => (y) { a = Conv<pads=[1,1,1,1]>(x, w1, b1)  r = Relu(a)"
    "  d = Conv<group=8, pads=[1,1,1,1]>(r, w2)  c = Conv<pads=[1,1,1,1]>(d, w3)  s = Relu(c)"
    "  e = Conv(s, w4, b4)  f = Reshape(e, shape)  h = Gemm(f, w5)  q = Relu(h)  y = Gemm<transB=1>(q, w6) }"
)
CONSTANTS = {
    "w1": (8, 3, 3, 3), "b1": (8,), "w2": (8, 1, 3, 3), "w3": (12, 8, 3, 3), "w4": (6, 12, 2, 1), "b4": (6,),
    "w5": (486, 7), "w6": (5, 7), "shape": np.array([1, 486]),
}  # fmt: skip


def _data(model: ir.Model, seed: int, count: int = 48):
    """Smooth images: neighbouring pixels are alike, so that weights can stand in for each other."""
    rng = np.random.default_rng(seed)
    images = rng.standard_normal((count, 1, 3, 10, 9)).astype(np.float32).cumsum(axis=3).cumsum(axis=4) / 5
    return images, load_dataset({"x": images[:, 0]}, input_specs(model))


def _zeros(model: ir.Model) -> dict[str, float]:
    found = {}
    for node in model.graph:
        if node.op_type in ("Conv", "Gemm"):
            array = const_of(data_input(node, 1))
            assert array is not None
            found[data_input(node, 1).name] = float((array == 0).mean())
    return found


def _error(model: ir.Model, pruned: ir.Model, images: np.ndarray) -> float:
    return sum(
        float(np.square(execute(model, {"x": image})["y"] - execute(pruned, {"x": image})["y"]).sum())
        for image in images
    )


@pytest.mark.parametrize("wanted", [PruneRequest(0.5), PruneRequest(0.75), PruneRequest(two_of_four=True)])
def test_what_goes(parse, wanted: PruneRequest) -> None:
    model = parse(TEXT, CONSTANTS)
    _, data = _data(model, 1)
    before = ir.to_proto(model).SerializeToString()
    pruned, names = prune(model, wanted, data)
    assert ir.to_proto(model).SerializeToString() == before
    zeros = _zeros(pruned)
    fraction = 0.5 if wanted.two_of_four else wanted.fraction
    # First, last and depthwise stay; w5's 486 inputs are no multiple of four.
    going = {"w3", "w4"} if wanted.two_of_four else {"w3", "w4", "w5"}
    assert len(names) == len(going)
    for name, found in zeros.items():
        assert found == pytest.approx(fraction if name in going else 0, abs=0.01), name
    if wanted.two_of_four:
        for node in pruned.graph:
            if node.op_type == "Conv" and data_input(node, 1).name in going:
                array = const_of(data_input(node, 1))
                assert array is not None and is_2_of_4(np.moveaxis(array, 1, -1))


@pytest.mark.parametrize("wanted", [PruneRequest(0.6), PruneRequest(two_of_four=True)])
def test_reconstruction_beats_magnitude(parse, wanted: PruneRequest) -> None:
    model = parse(TEXT, CONSTANTS)
    _, data = _data(model, 2)
    fresh, _ = _data(model, 3, 12)
    plain, _ = prune(model, wanted, synthetic(input_specs(model), 4))
    learned, _ = prune(model, wanted, data)
    assert _error(model, learned, fresh) < 0.6 * _error(model, plain, fresh)


def test_refitting_is_the_best_for_what_is_kept() -> None:
    rng = np.random.default_rng(5)
    x = rng.standard_normal((300, 24)) @ rng.standard_normal((24, 24))
    hessian, weights = damped((x.T @ x / 300)[None], 300), rng.standard_normal((1, 6, 24))
    kept, started = sparse_gpt(weights, hessian, _largest(0.5), 8)
    solved = refit(weights, hessian, kept, started)

    def error(found: np.ndarray) -> float:
        off = weights - found
        return float(((off @ hessian) * off).sum())

    assert kept.mean() == pytest.approx(0.5, abs=0.02) and not solved[~kept].any() and not started[~kept].any()
    magnitude = np.where(_largest(0.5)(np.abs(weights)), weights, 0)
    assert error(solved) <= error(started) < error(magnitude)
    for _ in range(20):
        assert error(solved) < error(solved + np.where(kept, 1e-3 * rng.standard_normal(weights.shape), 0))


def test_rounding_keeps_zeros() -> None:
    rng = np.random.default_rng(6)
    x = rng.standard_normal((200, 16)) @ rng.standard_normal((16, 16))
    hessian, weights = damped((x.T @ x / 200)[None], 200), rng.standard_normal((1, 4, 16))
    kept = _two_of_four(np.abs(weights))
    scale = np.abs(weights).max(axis=2, keepdims=True) / 7
    problem = Problem(weights, hessian, scale, np.zeros((1, 4, 1)), -7, 7, kept=kept)
    for integers in (problem.nearest(), gptq(problem), descend(problem, gptq(problem))):
        assert not integers[~kept].any()
    assert problem.error(descend(problem, gptq(problem))) < problem.error(problem.nearest())


def test_requests() -> None:
    assert pruning.parse("0.5") == PruneRequest(0.5) and pruning.parse("2:4").two_of_four
    for text in ("half", "0", "1", "-0.5", "1:4", "nan"):
        with pytest.raises(QCompilerError, match=f"--prune {text}: write a fraction"):
            pruning.parse(text)

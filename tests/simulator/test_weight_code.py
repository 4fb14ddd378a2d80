"""The size of encoded weights against an encoder that writes the bits, and what it does to a copy's price."""

import numpy as np
import pytest

from qcompiler.simulator import isa
from qcompiler.simulator.cost import price
from qcompiler.simulator.weight_code import EncodedSpan, golomb_rice_bytes, ratio_at
from qcompiler.target_loader import load_target


def written(values: list[int], k: int) -> str:
    """The code as a string of bits."""
    bits = ""
    for value in values:
        folded = 2 * value if value >= 0 else -2 * value - 1
        bits += "1" * (folded >> k) + "0" + (format(folded & ((1 << k) - 1), f"0{k}b") if k else "")
    return bits


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
@pytest.mark.parametrize("spread", [1, 6, 40])
def test_size_is_that_of_the_written_code(dtype: type[np.integer], spread: int) -> None:
    random = np.random.default_rng(spread)
    zero_point = 0 if dtype is np.int8 else 131
    info = np.iinfo(dtype)
    weights = np.clip(np.rint(random.laplace(zero_point, spread, 301)), info.min, info.max).astype(dtype)
    values = [int(weight) - zero_point for weight in weights]
    assert golomb_rice_bytes(weights, zero_point) == -(-min(len(written(values, k)) for k in range(8)) // 8)


def unary(count: int, k: int) -> str:
    return "1" * (count >> k) + "0" + (format(count & ((1 << k) - 1), f"0{k}b") if k else "")


@pytest.mark.parametrize("fraction", [0.5, 0.9])
def test_many_zeros_are_coded_as_runs(fraction: float) -> None:
    random = np.random.default_rng(3)
    weights = np.rint(random.laplace(0, 20, 500)).astype(np.int8)
    weights[random.random(500) < fraction] = 0
    runs, count, others = [], 0, []
    for weight in weights.tolist():
        if weight:
            runs.append(count)
            # No weight left is 0, so that 1 may be written as -1 was, and so on.
            others.append(2 * weight - 1 if weight > 0 else -2 * weight - 2)
            count = 0
        else:
            count += 1
    runs.append(count)
    expected = [min(sum(len(unary(value, k)) for value in values) for k in range(8)) for values in (others, runs)]
    assert golomb_rice_bytes(weights, 0) == -(-sum(expected) // 8)
    assert golomb_rice_bytes(np.zeros((3, 80), np.int8), 0) == 2


def test_spans_hold_their_first_byte_and_not_their_end() -> None:
    spans = (EncodedSpan(16, 48, 0.5), EncodedSpan(64, 80, 0.25))
    assert [ratio_at(spans, offset) for offset in (0, 15, 16, 47, 48, 64, 79, 80)] == [1, 1, 0.5, 0.5, 1, 0.25, 0.25, 1]
    assert ratio_at((), 3) == 1


def test_copies_of_encoded_weights_move_fewer_bytes() -> None:
    target = load_target("ethos-u55-128")
    words = [isa.DMA.code, 0, 0, 0, 4096, 1, 512, 0, 4096, 1, 1, 4096]
    spans = {1: (EncodedSpan(512, 4608, 0.75),)}
    plain, encoded = (price(words, target, {1: "flash"}, known) for known in ({}, spans))
    assert plain.cycles - encoded.cycles == 1024  # flash gives a byte a cycle
    assert [moved.read for moved in encoded.traffic if moved.memory == "flash"] == [3072]


def test_the_bundled_ethos_u_keep_weights_encoded() -> None:
    npus = [load_target(name).npu for name in ("ethos-u55-32", "ethos-u65-512", "systolic-npu")]
    assert [npu.weight_code for npu in npus if npu is not None] == ["golomb_rice", "golomb_rice", "plain"]

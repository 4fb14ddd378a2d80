"""The memory plan: nothing alive is overwritten, everything aligned, memory reused."""

import numpy as np
import pytest

from qcompiler.backends.workspace import ALIGNMENT, Lifetime, plan


@pytest.mark.parametrize("seed", range(20))
def test_tensors_alive_together_do_not_overlap(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tensors = [
        Lifetime(int(rng.integers(1, 5000)), first, first + int(rng.integers(0, 6)))
        for first in rng.integers(0, 40, int(rng.integers(1, 40))).tolist()
    ]
    offsets, size = plan(tensors)
    for index, (tensor, offset) in enumerate(zip(tensors, offsets, strict=True)):
        assert offset % ALIGNMENT == 0 and offset + tensor.size <= size
        for other in range(index):
            apart = offset >= offsets[other] + tensors[other].size or offsets[other] >= offset + tensor.size
            together = any(step in range(tensors[other].first, tensors[other].last + 1)
                           for step in range(tensor.first, tensor.last + 1))  # fmt: skip
            assert apart or not together


def test_a_chain_needs_two_neighbours_only() -> None:
    chain = [Lifetime(640, step, step + 1) for step in range(10)]
    assert plan(chain)[1] == 2 * 640


def test_nothing_needs_nothing() -> None:
    assert plan([]) == ([], 0)

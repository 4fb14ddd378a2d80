"""Placement of buffers with lifetimes."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.backends.npu_memory import Buffer, aligned, plan_memory


@st.composite
def lifetimes(draw: st.DrawFn) -> list[Buffer]:
    spans = draw(st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 20), st.integers(0, 6)), max_size=40))
    return [Buffer(f"b{i}", size, first, first + length) for i, (size, first, length) in enumerate(spans)]


@settings(max_examples=200, deadline=None)
@given(lifetimes(), st.sampled_from([1, 16, 64]))
def test_live_buffers_never_overlap(buffers: list[Buffer], alignment: int) -> None:
    plan = plan_memory(buffers, alignment)
    assert plan.buffers == tuple(buffers)
    assert all(offset % alignment == 0 and offset >= 0 for offset in plan.offsets)
    for step in range(30):
        live = sorted(
            (offset, offset + aligned(buffer.size, alignment))
            for buffer, offset in zip(plan.buffers, plan.offsets, strict=True)
            if buffer.first <= step <= buffer.last
        )
        assert all(before[1] <= after[0] for before, after in pairwise(live))
        assert sum(end - start for start, end in live) <= plan.lower_bound <= plan.peak
        assert all(end <= plan.peak for _, end in live)


def test_nothing_needs_nothing() -> None:
    plan = plan_memory([], 16)
    assert (plan.peak, plan.lower_bound, plan.offsets) == (0, 0, ())


def test_a_chain_reuses_memory() -> None:
    chain = [Buffer(f"map{i}", 1000 - 10 * i, i, i + 1) for i in range(20)]
    plan = plan_memory(chain, 16)
    assert plan.peak == plan.lower_bound == 1008 + 992


def test_random_plans_come_close_to_the_bound() -> None:
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(50):
        first = rng.integers(0, 40, 60)
        sizes, lengths = rng.integers(100, 20000, 60), rng.integers(1, 5, 60)
        buffers = [
            Buffer(str(i), int(size), int(start), int(start + length))
            for i, (size, start, length) in enumerate(zip(sizes, first, lengths, strict=True))
        ]
        plan = plan_memory(buffers, 16)
        ratios.append(plan.peak / plan.lower_bound)
    assert np.mean(ratios) < 1.05 and max(ratios) < 1.25


def test_offsets_go_by_name() -> None:
    plan = plan_memory([Buffer("a", 10, 0, 1), Buffer("b", 20, 1, 2)], 16)
    assert {plan.offset_of("a"), plan.offset_of("b")} in ({0, 16}, {0, 32})
    with pytest.raises(StopIteration):
        plan.offset_of("c")

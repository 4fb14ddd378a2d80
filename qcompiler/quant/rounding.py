"""Choose the integers of a layer's weights so that its outputs, rather than the weights themselves, stay close.

With input rows x the squared error of output row m is (w - ŵ)ᵀ H (w - ŵ), H = E[x xᵀ]: quadratic, and all that has to
be known of the data. Rounding each weight to the nearest integer ignores all but the diagonal of H. Three better ways:

- `gptq`: one weight after the other, and those still to come make up for its error (Frantar et al., GPTQ, ICLR 2023,
  algorithm 1; the columns in order of falling diagonal).
- `descend`: coordinate descent from any solution; the error never grows (Behdin et al., QuantEase, 2023, algorithm 1).
- `adaround`: up or down is learned for all weights at once through a relaxation (Nagel et al., Up or Down?, ICML 2020,
  equations 21-25), here on the quadratic form, so that an iteration costs the same however much data there was.

Shapes: weights [groups, M, K] float, H [groups, K, K] float64.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Rounder = Callable[["Problem"], np.ndarray]


@dataclass(frozen=True)
class Problem:
    """Weights to round, what an error in them costs, and the grid."""

    weights: np.ndarray
    """[groups, M, K] the real numbers to come close to."""
    hessian: np.ndarray
    """[groups, K, K] symmetric, positive definite."""
    scale: np.ndarray
    """[groups, M, K] or what broadcasts to it."""
    zero_point: np.ndarray
    """Like `scale`."""
    low: int
    """Smallest integer allowed."""
    high: int
    step: int = 1
    """Distance of neighbouring integers that are allowed."""
    kept: np.ndarray | None = None
    """bool [groups, M, K]: where False, the weight is 0 whatever it costs. None: nowhere."""

    def nearest(self) -> np.ndarray:
        """Each weight rounded on its own; integers as float64 [groups, M, K]."""
        return self.masked(self.round(self.weights / self.scale, self.zero_point))

    def masked(self, integers: np.ndarray) -> np.ndarray:
        """Those of pruned weights replaced by what stands for 0."""
        return integers if self.kept is None else np.where(self.kept, integers, self.zero_point)

    def round(self, steps: np.ndarray, zero_point: np.ndarray) -> np.ndarray:
        """The allowed integers nearest to real numbers of scales, away from `zero_point`."""
        if self.step == 1:
            return np.clip(np.rint(steps) + zero_point, self.low, self.high)
        count = np.rint((steps + zero_point - self.low) / self.step)
        return np.clip(self.low + self.step * count, self.low, self.high)

    def real(self, integers: np.ndarray) -> np.ndarray:
        return (integers - self.zero_point) * self.scale

    def errors(self, integers: np.ndarray) -> np.ndarray:
        """Mean squared error of each output, [groups, M]."""
        off = self.weights - self.real(integers)
        return ((off @ self.hessian) * off).sum(axis=-1)

    def error(self, integers: np.ndarray) -> float:
        return float(self.errors(integers).sum())


DAMPING = 0.01
"""As GPTQ has it."""


def damped(hessian: np.ndarray, rows: int, fraction: float = DAMPING) -> np.ndarray:
    """H made safe to invert and to trust.

    Off-diagonal entries shrink by K / (K + rows), for what few rows say of correlations is noise; then `fraction` of
    the mean diagonal is added to the diagonal.
    """
    size = hessian.shape[-1]
    diagonal = np.einsum("gkk->gk", hessian)
    trust = rows / (rows + size)
    mean = diagonal.mean(axis=1, keepdims=True)
    extra = (1 - trust) * diagonal + fraction * np.where(mean > 0, mean, 1)
    return trust * hessian + extra[:, :, None] * np.eye(size)


_BLOCK = 128
"""Columns after which GPTQ updates those behind them."""


def gptq(problem: Problem) -> np.ndarray:
    """Closed form: integers as float64 [groups, M, K]."""
    order = np.argsort(-np.einsum("gkk->gk", problem.hessian), axis=1, kind="stable")
    columns = order[:, None, :]
    hessian = np.take_along_axis(np.take_along_axis(problem.hessian, order[:, :, None], 1), columns, 2)
    left = np.take_along_axis(problem.weights.astype(np.float64), columns, 2)
    # Row k of the upper Cholesky factor of the inverse says how the later weights make up for an error in weight k.
    factor = np.linalg.cholesky(np.linalg.inv(hessian)).transpose(0, 2, 1)
    scale, zero = (
        np.take_along_axis(np.broadcast_to(array, left.shape), columns, 2)
        for array in (problem.scale, problem.zero_point)
    )
    kept = None if problem.kept is None else np.take_along_axis(problem.kept, columns, 2)
    chosen, errors = np.empty_like(left), np.empty_like(left)
    size = left.shape[2]
    for start in range(0, size, _BLOCK):
        stop = min(start + _BLOCK, size)
        for k in range(start, stop):
            integers = problem.round(left[..., k] / scale[..., k], zero[..., k])
            chosen[..., k] = integers if kept is None else np.where(kept[..., k], integers, zero[..., k])
            error = (left[..., k] - (chosen[..., k] - zero[..., k]) * scale[..., k]) / factor[:, k, k, None]
            errors[..., k] = error
            left[..., k + 1 : stop] -= error[..., None] * factor[:, None, k, k + 1 : stop]
        # What lies behind the block makes up for all its errors at once: the same sums, but as a matrix product.
        left[..., stop:] -= errors[..., start:stop] @ factor[:, start:stop, stop:]
    return np.take_along_axis(chosen, np.argsort(order, axis=1)[:, None, :], 2)


def descend(problem: Problem, start: np.ndarray, sweeps: int = 4) -> np.ndarray:
    """Set one weight after the other to the best integer given all others, `sweeps` times or until none changes."""
    chosen = start.astype(np.float64)
    pull = (problem.weights - problem.real(chosen)) @ problem.hessian
    scale, zero = (np.broadcast_to(array, chosen.shape) for array in (problem.scale, problem.zero_point))
    diagonal = np.einsum("gkk->gk", problem.hessian)
    for _ in range(sweeps):
        changed = False
        for k in range(chosen.shape[2]):
            best = (chosen[..., k] - zero[..., k]) * scale[..., k] + pull[..., k] / diagonal[:, k, None]
            integers = problem.round(best / scale[..., k], zero[..., k])
            if problem.kept is not None:
                integers = np.where(problem.kept[..., k], integers, zero[..., k])
            step = (integers - chosen[..., k]) * scale[..., k]
            groups, rows = np.nonzero(step)
            if rows.size:
                # Few rows change once a solution is good, and most of the time goes into this update.
                pull[groups, rows] -= step[groups, rows, None] * problem.hessian[groups, k]
                chosen[..., k] = integers
                changed = True
        if not changed:
            break
    return chosen


_STRETCH = (-0.1, 1.1)
"""The rectified sigmoid reaches 0 and 1 because it is stretched to this interval and clipped."""


def adaround(problem: Problem, iterations: int = 1000, *, rate: float = 0.03, pressure: float = 10.0) -> np.ndarray:
    """Learn for each weight whether it is rounded up or down, by Adam; integers as float64 [groups, M, K].

    Args:
        rate: Adam's step size.
        pressure: weight of the term that drives the soft decisions to 0 or 1, relative to the error of rounding to
            nearest per weight; its exponent falls from 20 to 2 after the first fifth of the iterations.
    """
    steps = (problem.weights / problem.scale + problem.zero_point - problem.low) / problem.step
    below = problem.low + problem.step * np.floor(steps)
    low, high = _STRETCH
    fraction = steps - np.floor(steps)
    inner = np.clip((fraction - low) / (high - low), 1e-4, 1 - 1e-4)
    logits = np.log(inner / (1 - inner)).astype(np.float32)
    hessian, scale = problem.hessian.astype(np.float32), np.asarray(problem.scale * problem.step, np.float32)
    base = (problem.weights - problem.real(below)).astype(np.float32)
    # In units of the nearest rounding's error per weight, rate and pressure suit every layer.
    unit = np.maximum(problem.errors(problem.nearest()) / base.shape[-1], 1e-30)[..., None].astype(np.float32)
    first, second = np.zeros_like(logits), np.zeros_like(logits)
    for step in range(1, iterations + 1):
        sigmoid = 1 / (1 + np.exp(-logits))
        soft = np.clip(sigmoid * (high - low) + low, 0, 1)
        gradient = -2 * scale * ((base - scale * soft) @ hessian) / unit
        progress = max(0.0, step / iterations - 0.2) / 0.8
        if progress > 0:
            exponent = 2 + 9 * (1 + np.cos(np.pi * progress))
            centered = 2 * soft - 1
            gradient -= pressure * 2 * exponent * np.abs(centered) ** (exponent - 1) * np.sign(centered)
        gradient *= (high - low) * sigmoid * (1 - sigmoid) * ((soft > 0) & (soft < 1))
        first += 0.1 * (gradient - first)
        second += 0.001 * (gradient**2 - second)
        logits -= rate * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
    up = 1 / (1 + np.exp(-logits)) * (high - low) + low >= 0.5
    return problem.masked(np.clip(below + problem.step * up, problem.low, problem.high))

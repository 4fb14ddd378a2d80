"""Weights that make up for errors in what they multiply (Li et al., GPTAQ, ICML 2025, section 3).

With inputs x̂ in place of x, outputs come nearest to W x by W E[x x̂ᵀ] E[x̂ x̂ᵀ]⁻¹ = W + W E[(x - x̂) x̂ᵀ] E[x̂ x̂ᵀ]⁻¹.
What few samples say of x - x̂ is largely chance, the more so the fewer rows a layer has, so the diagonal of E[x̂ x̂ᵀ] is
raised. How far is found out for each layer by halves of the samples: what either says is tried on the other.
"""

from collections.abc import Sequence
from functools import reduce

import numpy as np

from qcompiler.quant.moments import Moments
from qcompiler.quant.rounding import damped

DAMPINGS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""What may be added to the diagonal, in its mean."""


def corrected(weights: np.ndarray, seen: Sequence[Moments], *, centred: bool) -> np.ndarray:
    """The weights to aim at, or those given where nothing is gained.

    Args:
        weights: [groups, M, K] float64.
        seen: by parts of the samples, two or more; with one part the least damping is taken.
        centred: whether a bias takes out the means.
    """

    def error(damping: float) -> float:
        """With the damping, of each part, corrected by the others."""
        total = 0.0
        for index, part in enumerate(seen):
            others = reduce(Moments.joined, [other for place, other in enumerate(seen) if place != index])
            total += _error(weights, _corrected(weights, others, damping, centred=centred), part, centred=centred)
        return total

    everything = reduce(Moments.joined, seen)
    if len(seen) == 1:
        return _corrected(weights, everything, DAMPINGS[0], centred=centred)
    errors = [error(damping) for damping in DAMPINGS]
    best = int(np.argmin(errors))
    if errors[best] >= sum(_error(weights, weights, part, centred=centred) for part in seen):
        return weights
    return _corrected(weights, everything, DAMPINGS[best], centred=centred)


def _corrected(weights: np.ndarray, seen: Moments, damping: float, *, centred: bool) -> np.ndarray:
    gram, cross = (seen.covariance, seen.cross_covariance) if centred else (seen.gram, seen.cross)
    # cross is E[x̂ xᵀ]; what the damping adds to the diagonal pulls towards the weights as they are.
    wanted = (cross - gram) @ weights.transpose(0, 2, 1)
    return weights + np.linalg.solve(damped(gram, seen.rows, damping), wanted).transpose(0, 2, 1)


def _error(weights: np.ndarray, found: np.ndarray, seen: Moments, *, centred: bool) -> float:
    """E |W x - Ŵ x̂|² over all outputs, less E |W x|², which is the same for every Ŵ."""
    gram, cross = (seen.covariance, seen.cross_covariance) if centred else (seen.gram, seen.cross)
    return float(((found @ gram - 2 * (weights @ cross.transpose(0, 2, 1))) * found).sum())

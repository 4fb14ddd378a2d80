"""Teach the rounded network to answer as the float one does."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch.nn import functional as F  # noqa: N812  # pyright: ignore[reportMissingImports]

from qcompiler.finetune.network import Network
from qcompiler.finetune.options import Schedule
from qcompiler.quant.repair import LEAST_PROBABILITY

Tensors = Mapping[str, torch.Tensor]

SCALE_RATE = 0.5
"""The rate of the scales' logarithms, over that of weights in their units."""


@dataclass(frozen=True)
class Lesson:
    """What is learned from: all samples, and what the float model makes of them."""

    inputs: Tensors
    """[samples, *shape] by input name."""
    outputs: Tensors
    """Of the float model, likewise."""
    classes: str | None
    """The output that holds scores of classes, if there is one."""
    labels: torch.Tensor | None
    """int64 [samples]: the class of each sample, if known."""

    @property
    def gives_probabilities(self) -> bool:
        """Whether the scores of classes have been through a softmax."""
        if self.classes is None:
            return False
        scores = self.outputs[self.classes].flatten(1)
        return bool((scores >= 0).all()) and bool(((scores.sum(1) - 1).abs() < 1e-3).all())

    @property
    def samples(self) -> int:
        return len(next(iter(self.inputs.values())))


def run_batches(network: Network, inputs: Tensors, batch: int) -> dict[str, torch.Tensor]:
    """Outputs for all samples, without gradients."""
    count = len(next(iter(inputs.values())))
    parts: list[dict[str, torch.Tensor]] = []
    with torch.no_grad():
        for start in range(0, count, batch):
            parts.append(network({name: tensor[start : start + batch] for name, tensor in inputs.items()}))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def train(
    network: Network,
    lesson: Lesson,
    schedule: Schedule,
    rate: float,
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """Adam with a rate that falls to zero along a half cosine; samples in an order the seed decides.

    Args:
        network: rounds with a plan; changed in place.
        lesson: the samples.
        schedule: how long.
        rate: at the beginning, in units of each tensor (`Network.weights`).
        progress: told (steps done, steps in all).

    Returns:
        The mean loss of each epoch.
    """
    order = np.random.default_rng(schedule.seed)
    batch = min(schedule.batch, lesson.samples)
    steps = -(-lesson.samples // batch)
    total = steps * schedule.epochs
    optimizer = torch.optim.Adam(
        [
            *({"params": [parameter], "lr": rate * unit} for parameter, unit in network.weights()),
            {"params": network.scales(), "lr": rate * SCALE_RATE},
        ]
    )
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    spreads = {name: tensor.var().clamp_min(1e-12) for name, tensor in lesson.outputs.items()}
    probabilities = lesson.gives_probabilities
    history: list[float] = []
    for epoch in range(schedule.epochs):
        shuffled = torch.from_numpy(order.permutation(lesson.samples))
        losses: list[float] = []
        for step in range(steps):
            chosen = shuffled[step * batch : (step + 1) * batch]
            outputs = network({name: tensor[chosen] for name, tensor in lesson.inputs.items()})
            loss = _loss(outputs, lesson, chosen, spreads, probabilities=probabilities)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            falling.step()
            losses.append(float(loss.detach()))
            if progress is not None:
                progress(epoch * steps + step + 1, total)
        history.append(float(np.mean(losses)))
    return history


def _loss(
    outputs: Tensors, lesson: Lesson, chosen: torch.Tensor, spreads: Tensors, *, probabilities: bool
) -> torch.Tensor:
    """Squared errors over the outputs' variance; of classes also Kullback-Leibler's divergence, and labels if known."""
    parts = [
        F.mse_loss(tensor, lesson.outputs[name][chosen]) / spreads[name]
        for name, tensor in outputs.items()
        if tensor.is_floating_point()
    ]
    if lesson.classes is not None:
        scores = (lesson.outputs[lesson.classes][chosen], outputs[lesson.classes])
        teacher, student = (_logarithms(each, probabilities=probabilities) for each in scores)
        parts.append(F.kl_div(student, teacher, reduction="batchmean", log_target=True))
        if lesson.labels is not None:
            parts.append(F.nll_loss(student, lesson.labels[chosen]))
    return torch.stack(parts).sum()


def _logarithms(scores: torch.Tensor, *, probabilities: bool) -> torch.Tensor:
    """Logarithms of probabilities [samples, classes], of scores [samples, …]."""
    flat = scores.flatten(1)
    return flat.clamp_min(LEAST_PROBABILITY).log() if probabilities else flat.log_softmax(1)

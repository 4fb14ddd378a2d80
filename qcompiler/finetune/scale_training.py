"""The training behind `tune_scales`: scales and biases learn to reproduce the float network's tensors."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch  # pyright: ignore[reportMissingImports]
from torch.nn import functional as F  # noqa: N812  # pyright: ignore[reportMissingImports]

from qcompiler.calibrate import Progress
from qcompiler.finetune.network import Network
from qcompiler.graph import input_of, shape_of, value_name
from qcompiler.quant.moments import Sample
from qcompiler.quant.types import QuantPlan

EPOCHS = 40
BATCH = 16
SCALE_RATE = 5e-3
"""Adam's at the beginning for logarithms of scales: a step changes a scale by half a percent."""
BIAS_RATE = 3e-3
"""The same for biases, in their units (`Network.weights`)."""

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Trained:
    """What was learned."""

    plan: QuantPlan
    biases: dict[str, np.ndarray]
    """By node name, [output channels]."""


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums come out the same on every number of cores; and small networks are not slowed down by waiting."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def train_scales(
    model: ir.Model,
    shifted: ir.Model,
    plan: QuantPlan,
    compared: Sequence[str],
    samples: Sequence[Sample],
    seconds: float,
    *,
    power_of_two: bool,
    seed: int,
    progress: Progress | None,
) -> Trained:
    """Adam on the errors of tensors, each over its variance; later ones weigh more, for in them errors add up.

    Images are mirrored half of the time. Arguments as of `tune_scales`, and:

    Args:
        shifted: the model with the biases to begin with; each layer has its own.
        plan: says the integers of all weights, and shifts no biases.
        compared: names of the tensors to reproduce, in order.
    """
    teacher = Network(model.graph, outputs=compared)
    student = Network(shifted.graph, plan, power_of_two=power_of_two, outputs=compared)
    inputs = {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in samples[0]}
    names = {value_name(value): value for value in model.graph.inputs}
    axes = {name: axis for name, value in names.items() if (axis := mirrored_axis(shape_of(value))) is not None}
    spreads = _variances(teacher, inputs, len(samples))
    weights = {name: (index + 1) / len(compared) for index, name in enumerate(compared)}
    scale = sum(weights.values())

    groups = [{"params": [parameter], "lr": BIAS_RATE * unit} for parameter, unit in student.weights()]
    if not power_of_two:
        groups.append({"params": student.weight_scales(), "lr": SCALE_RATE})
    rates = [float(group["lr"]) for group in groups]
    optimizer = torch.optim.Adam(groups)
    order = np.random.default_rng(seed)
    start = time.thread_time()
    steps = max(1, len(samples) // BATCH)
    done, total = 0, steps * EPOCHS
    while done < total:
        for chosen in _batches(len(samples), steps, order):
            batch = {name: tensor[chosen] for name, tensor in inputs.items()}
            if axes and order.random() < 0.5:
                batch = {name: x.flip(axes[name] + 1) if name in axes else x for name, x in batch.items()}
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 + np.cos(np.pi * done / total)) / 2
            with torch.no_grad():
                wanted = teacher(batch)
            found = student(batch)
            errors = [weights[name] * F.mse_loss(found[name], wanted[name]) / spreads[name] for name in compared]
            loss = torch.stack(errors).sum() / scale
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1
            if progress is not None:
                progress(done, total)
        if done == steps:
            # The rate falls to zero however many epochs there are, so that must be known early.
            affordable = int(seconds / max(time.thread_time() - start, 1e-6))
            total = min(total, steps * max(1, affordable))
    return Trained(student.learned_plan(), _biases(shifted.graph, student))


def mirrored_axis(shape: Sequence[int]) -> int | None:
    """The axis along which images of this shape are mirrored, left for right; None unless they have three channels."""
    if len(shape) != 4 or 3 not in (shape[1], shape[3]):
        return None
    return 3 if shape[1] == 3 else 2


def _variances(teacher: Network, inputs: Tensors, count: int) -> dict[str, torch.Tensor]:
    """Of each tensor over all samples, which never are in memory together."""
    sums: dict[str, torch.Tensor] = {}
    sizes: dict[str, int] = {}
    for start in range(0, count, BATCH):
        with torch.no_grad():
            found = teacher({name: tensor[start : start + BATCH] for name, tensor in inputs.items()})
        for name, tensor in found.items():
            each = tensor.double()
            sums[name] = sums.get(name, 0) + torch.stack([each.sum(), each.square().sum()])
            sizes[name] = sizes.get(name, 0) + each.numel()
    moments = {name: total / sizes[name] for name, total in sums.items()}
    return {name: (square - mean**2).float().clamp_min(1e-12) for name, (mean, square) in moments.items()}


def _batches(count: int, steps: int, order: np.random.Generator) -> Iterator[torch.Tensor]:
    """An epoch: indices of all samples in so many parts, shuffled."""
    return (torch.from_numpy(part) for part in np.array_split(order.permutation(count), steps))


def _biases(shifted: ir.Graph, student: Network) -> dict[str, np.ndarray]:
    constants = student.learned_constants()
    return {
        node.name or "": constants[bias.name or ""].reshape(-1)
        for node in shifted
        if (bias := input_of(node, 2)) is not None and bias.name in constants
    }

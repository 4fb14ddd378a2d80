"""A network of ONNX operators in torch, with fake quantization where a plan puts it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]

from qcompiler.errors import QCompilerError
from qcompiler.finetune.fake_quant import FakeQuantize, FixedIntegers
from qcompiler.finetune.operators import OPERATORS, refusal, tensor_of
from qcompiler.finetune.sharing import constants_like_outputs, shared_formats
from qcompiler.graph import const_of, data_input, input_of, shape_of, value_name
from qcompiler.quant.formats import bias_format, limits
from qcompiler.quant.operators import has_weights
from qcompiler.quant.types import QuantPlan, TensorFormat

Tensors = Mapping[str, torch.Tensor]


class Network(nn.Module):
    """Computes a float graph, rounding tensors as `quantize` would make the quantized model do.

    Weights and biases of quantized convolutions and matrix products are parameters, and so are the scales of their
    formats and of activations. Where the plan says which integers weights become, only their scales are. Other
    constants stay as they are; what several operators read is one parameter.

    Args:
        graph: simplified and legalized, with static shapes.
        plan: what is rounded to what; None computes in float.
        power_of_two: whether the target wants scales that are powers of two.
        outputs: names of the tensors to give; without them the graph's outputs.

    Raises:
        QCompilerError: an operator is not known; the message names it.
    """

    def __init__(
        self,
        graph: ir.Graph,
        plan: QuantPlan | None = None,
        *,
        power_of_two: bool = False,
        outputs: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        for node in graph:
            if (reason := refusal(node)) is not None:
                raise QCompilerError(
                    f"cannot finetune through the operator {node.name!r} ({node.op_type}): {reason}. Cut the model "
                    "before it and finetune the first part, or do without training: `qcompile quantize --quality best`."
                )
        self._graph = graph
        self._plan = plan = plan or QuantPlan({}, {}, {}, {node.name or "": "" for node in graph})
        self._shared = shared_formats(graph, plan)
        self._constants_like = constants_like_outputs(graph, plan)
        values = {
            value_name(value): value for value in (*graph.inputs, *(out for node in graph for out in node.outputs))
        }
        self._outputs = list(graph.outputs) if outputs is None else [values[name] for name in outputs]
        trained = _trained(graph, plan)
        self._weights = nn.ParameterDict()
        self._constants: dict[str, torch.Tensor] = {}
        for name, value in graph.initializers.items():
            array = const_of(value)
            assert array is not None
            if name in trained and name not in plan.rounded:
                self._weights[_key(name)] = nn.Parameter(tensor_of(array))
            else:
                self._constants[name] = tensor_of(array)
        self._quantizers = nn.ModuleDict()
        for name in dict.fromkeys(self._shared.values()):
            rank = len(shape_of(values[name]))
            self._quantizers[_key(name)] = FakeQuantize(plan.activations[name], rank, power_of_two=power_of_two)
        for name, fmt in plan.weights.items():
            if name in plan.rounded:
                self._quantizers[_key(name)] = FixedIntegers(plan.rounded[name], fmt, fixed=power_of_two)
            elif name not in self._constants_like:
                rank = len(shape_of(graph.initializers[name]))
                self._quantizers[_key(name)] = FakeQuantize(
                    fmt, rank, weights=name in trained, power_of_two=power_of_two, fixed=name not in trained
                )

    def forward(self, inputs: Tensors) -> dict[str, torch.Tensor]:
        """Run a batch: by input name [samples, *shape]; gives [samples, *shape] by output name."""
        return torch.func.vmap(self._one)(dict(inputs))

    def weights(self) -> list[tuple[nn.Parameter, float]]:
        """Weights and biases, each with its unit: what would be a change of the size of the layer itself.

        That is the root mean square of weights, and for biases that times a quarter of the interval the layer reads: a
        network that takes pixels of 0 to 255 has first weights a hundred times smaller than one that normalizes them.
        """
        units: dict[str, float] = {}
        for node in self._graph:
            if not has_weights(node) or node.name in self._plan.float_nodes:
                continue
            weights, bias = data_input(node, 1), input_of(node, 2)
            array = const_of(weights)
            assert array is not None
            size = float(np.sqrt(np.square(array, dtype=np.float64).mean())) or 1.0
            fmt = self._plan.activations[value_name(data_input(node))]
            low, high = fmt.used or limits(fmt.dtype)
            units[value_name(weights)] = size
            if bias is not None:
                units[value_name(bias)] = size * (high - low) * float(fmt.scale) / 4
        return [(self._weights[_key(name)], unit) for name, unit in units.items() if _key(name) in self._weights]

    def scales(self) -> list[nn.Parameter]:
        """Logarithms of the scales that are learned."""
        return [parameter for parameter in self._quantizers.parameters() if parameter.requires_grad]

    def weight_scales(self) -> list[nn.Parameter]:
        """Those of them that weights with chosen integers have."""
        fixed = (each for each in self._quantizers.values() if isinstance(each, FixedIntegers))
        return [each.log_scale for each in fixed if each.log_scale.requires_grad]

    def learned_constants(self) -> dict[str, np.ndarray]:
        """Weights and biases by initializer name."""
        return {
            name: self._weights[_key(name)].detach().numpy().copy()
            for name in self._graph.initializers
            if _key(name) in self._weights
        }

    def learned_plan(self) -> QuantPlan:
        """The plan with the present scales."""
        activations = {name: self._format(first) for name, first in self._shared.items()}
        weights = {
            name: activations[self._constants_like[name]] if name in self._constants_like else self._format(name)
            for name in self._plan.weights
        }
        biases = dict(self._plan.biases)
        for node in self._graph:
            if node.name in biases:
                source, weight = value_name(data_input(node)), weights[value_name(data_input(node, 1))]
                biases[node.name] = bias_format(activations[source].scale, weight)
        return replace(self._plan, activations=activations, weights=weights, biases=biases)

    def _format(self, name: str) -> TensorFormat:
        quantizer = self._quantizers[_key(name)]
        assert isinstance(quantizer, FakeQuantize | FixedIntegers)
        return quantizer.learned()

    # --- one sample ------------------------------------------------------------------------------------------

    def _one(self, inputs: Tensors) -> dict[str, torch.Tensor]:
        plan, floats = self._plan, self._plan.float_nodes
        exact: dict[ir.Value, torch.Tensor] = {}
        rounded: dict[ir.Value, torch.Tensor] = {}

        def define(value: ir.Value, tensor: torch.Tensor) -> None:
            exact[value] = tensor
            if value.name in plan.activations:
                rounded[value] = self._quantizers[_key(self._shared[value_name(value)])](tensor)

        def read(value: ir.Value | None, node: ir.Node) -> torch.Tensor | None:
            if value is None:
                return None
            if value not in exact:
                return self._constant(value, quantized=node.name not in floats)
            maker = value.producer()
            in_float = node.name in floats and (maker is None or maker.name in floats)
            return exact[value] if in_float else rounded.get(value, exact[value])

        for value in self._graph.inputs:
            define(value, inputs[value_name(value)])
        for node in self._graph:
            results = OPERATORS[node.op_type](node, [read(value, node) for value in node.inputs])
            tensors = results if isinstance(results, tuple) else (results,)
            for output, tensor in zip(node.outputs, tensors, strict=False):
                assert tuple(tensor.shape) == shape_of(output), f"{node.name} gives {tuple(tensor.shape)}"
                define(output, tensor)

        def final(value: ir.Value) -> torch.Tensor:
            maker = value.producer()
            return exact[value] if maker is None or maker.name in floats else rounded.get(value, exact[value])

        return {value_name(value): final(value) for value in self._outputs}

    def _constant(self, value: ir.Value, *, quantized: bool) -> torch.Tensor:
        name = value_name(value)
        tensor = self._weights[_key(name)] if _key(name) in self._weights else self._constants[name]
        if not quantized or name not in self._plan.weights:
            return tensor
        like = self._constants_like.get(name)
        return self._quantizers[_key(name) if like is None else _key(self._shared[like])](tensor)


def _key(name: str) -> str:
    """A name torch takes for a parameter or module."""
    return "value " + name.replace(".", "\N{FULLWIDTH FULL STOP}")


def _trained(graph: ir.Graph, plan: QuantPlan) -> set[str]:
    """Initializers that quantized convolutions and matrix products have as weights or biases."""
    quantized = [node for node in graph if has_weights(node) and node.name not in plan.float_nodes]
    operands = [value for node in quantized for value in node.inputs[1:3]]
    return {value_name(value) for value in operands if value is not None}

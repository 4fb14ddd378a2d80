"""The chip as data: the typed form of a target spec.

Everything the compiler knows about hardware is asked of a `Target`; no code tests a target's name. The YAML
form, inheritance and error messages live in `qcompiler.target_loader`. Units are mandatory in YAML and are
parsed here into SI-like base units, named in each field's docstring.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from qcompiler.quant.arithmetic import RequantizeVariant


class Spec(BaseModel):
    """Frozen, and closed: an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


# --- units ---------------------------------------------------------------------------------------------

_NUMBER = re.compile(r"\s*([+-]?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*(\S.*?)?\s*$")

BYTE_UNITS: dict[str, float] = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
HERTZ_UNITS: dict[str, float] = {"Hz": 1, "kHz": 1e3, "MHz": 1e6, "GHz": 1e9}
ENERGY_UNITS: dict[str, float] = {"fJ": 1e-3, "pJ": 1, "nJ": 1e3}
ENERGY_PER_BYTE_UNITS: dict[str, float] = {"fJ/B": 1e-3, "pJ/B": 1, "nJ/B": 1e3}
POWER_UNITS: dict[str, float] = {"uW": 1e-6, "mW": 1e-3, "W": 1}
MAC_RATE_UNITS: dict[str, float] = {"MAC/cycle": 1}
ELEMENT_RATE_UNITS: dict[str, float] = {"element/cycle": 1}


def parse_unit(text: object, units: Mapping[str, float]) -> float:
    """Turn "512 KiB" into 524288.0. Raises ValueError naming the units allowed."""
    allowed = ", ".join(units)
    match = _NUMBER.match(text) if isinstance(text, str) else None
    if match is None or match.group(2) is None:
        raise ValueError(f"{text!r} needs a number and a unit ({allowed})")
    if match.group(2) not in units:
        raise ValueError(f"{match.group(2)!r} is not a unit of this figure ({allowed})")
    return float(match.group(1)) * units[match.group(2)]


def _whole(text: object, units: Mapping[str, float]) -> int:
    value = parse_unit(text, units)
    if value != int(value):
        raise ValueError(f"{text!r} is not a whole number")
    return int(value)


Bytes = Annotated[int, BeforeValidator(lambda text: _whole(text, BYTE_UNITS)), Field(ge=0)]
Hertz = Annotated[float, BeforeValidator(lambda text: parse_unit(text, HERTZ_UNITS)), Field(gt=0)]
Picojoules = Annotated[float, BeforeValidator(lambda text: parse_unit(text, ENERGY_UNITS)), Field(ge=0)]
PicojoulesPerByte = Annotated[float, BeforeValidator(lambda text: parse_unit(text, ENERGY_PER_BYTE_UNITS)), Field(ge=0)]
Watts = Annotated[float, BeforeValidator(lambda text: parse_unit(text, POWER_UNITS)), Field(ge=0)]
MacRate = Annotated[float, BeforeValidator(lambda text: parse_unit(text, MAC_RATE_UNITS)), Field(gt=0)]
ElementRate = Annotated[float, BeforeValidator(lambda text: parse_unit(text, ELEMENT_RATE_UNITS)), Field(gt=0)]


class Duration(Spec):
    """A time in cycles of the target's clock or in seconds, whichever the source gives."""

    value: float
    unit: Literal["cycles", "s"]

    @model_validator(mode="before")
    @classmethod
    def parse(cls, data: object) -> object:
        if isinstance(data, dict):
            return data
        if isinstance(data, str) and data.rstrip().endswith(("cycle", "cycles")):
            return {"value": parse_unit(data, {"cycle": 1, "cycles": 1}), "unit": "cycles"}
        return {
            "value": parse_unit(data, {"cycles": 1, "ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1}),
            "unit": "s",
        }

    def cycles(self, clock: float) -> float:
        return self.value if self.unit == "cycles" else self.value * clock


class Bandwidth(Spec):
    """Bytes per cycle of the target's clock, or bytes per second, whichever the source gives."""

    value: float
    unit: Literal["B/cycle", "B/s"]

    @model_validator(mode="before")
    @classmethod
    def parse(cls, data: object) -> object:
        if isinstance(data, dict):
            return data
        if isinstance(data, str) and data.rstrip().endswith("B/cycle"):
            return {"value": parse_unit(data, {"B/cycle": 1}), "unit": "B/cycle"}
        return {"value": parse_unit(data, {"B/cycle": 1, "MB/s": 1e6, "GB/s": 1e9}), "unit": "B/s"}

    def per_cycle(self, clock: float) -> float:
        return self.value if self.unit == "B/cycle" else self.value / clock


# --- memories and engines ------------------------------------------------------------------------------


class Energy(Spec):
    """Energy per byte moved, pJ/B."""

    read: PicojoulesPerByte
    write: PicojoulesPerByte


class Memory(Spec):
    kind: Literal["external", "scratchpad", "flash"]
    """external: holds everything, reached by DMA. scratchpad: what engines compute from. flash: read-only weights."""
    size: Bytes
    bandwidth: Bandwidth
    latency: Duration
    energy: Energy
    alignment: Bytes = 16
    burst: Bytes = 32


class Dma(Spec):
    """One path between memories; copies on one channel run in order, beside the engines."""

    channels: int = Field(ge=1)
    bandwidth: Bandwidth
    setup: Duration


class MacArray(Spec):
    """Ethos-U-like: an output-stationary array working on OFM blocks of whole micro-blocks (ublocks).

    ublock: OFM height, width, depth finished by one pass; reduction: input channels consumed per cycle.
    output_cycles / activation_cycles: cycles per output element of the output stage, by kind
    (source: ethosu/regor/architecture/ethosu55/ethos_u55_performance.cpp in the ethos-u-vela sdist).
    """

    kind: Literal["mac_array"]
    ublock: tuple[int, int, int]
    ifm_ublock: tuple[int, int, int]
    block_max: tuple[int, int, int]
    """OFM block limit, height, width, depth."""
    cores: int = Field(default=1, ge=1)
    accumulator_banks: int
    bank_size: Bytes
    granules: tuple[int, ...]
    """Bank granularity: IFM8, IFM16, IFM8 elementwise, IFM16 elementwise, IFM32, Acc16, Acc32, Acc40."""
    output_cycles: tuple[float, ...]
    """unary i32, binary i32, multiply to i32, multiply, simple add, add/subtract with rescale, max pool, other."""
    activation_cycles: tuple[float, float, float]
    """lookup table, ReLU-like clamp, none."""


class Systolic(Spec):
    """A rows × cols systolic array fed from the scratchpad."""

    kind: Literal["systolic"]
    rows: int = Field(ge=1)
    cols: int = Field(ge=1)
    dataflow: Literal["weight_stationary", "output_stationary"]


class Simd(Spec):
    """A vector unit: elementwise, pooling, lookup, softmax."""

    kind: Literal["simd"]
    lanes: int = Field(ge=1)
    element_rate: Mapping[str, ElementRate]
    """Elements per cycle by operator class: elementwise, pool, lookup, softmax, resize."""


EngineGeometry = Annotated[MacArray | Systolic | Simd, Field(discriminator="kind")]


class MacPrecision(Spec):
    """What a multiply-accumulate of one precision pair costs. rate counts the whole engine."""

    rate: MacRate
    energy: Picojoules


class Engine(Spec):
    geometry: EngineGeometry
    precisions: Mapping[str, MacPrecision] = {}
    """By pair, activation*weight: "int8*int8", "int16*int8", "int8*int4"…"""
    issue: Duration = Duration(value=0, unit="cycles")
    """Fixed cost of starting one command."""


# --- quantization ---------------------------------------------------------------------------------------


class ActivationFormat(Spec):
    dtypes: tuple[Literal["int8", "uint8", "int16"], ...]
    symmetric: bool = False


class WeightFormat(Spec):
    dtypes: tuple[Literal["int8", "uint8", "int4"], ...]
    symmetric: bool = True
    per_channel: bool = True
    narrow_range: bool = True


class Quantization(Spec):
    activations: ActivationFormat
    weights: WeightFormat
    requantize: RequantizeVariant
    shared_scale: tuple[str, ...] = (
        "Concat",
        "MaxPool",
        "Resize",
        "Reshape",
        "Transpose",
        "Slice",
        "Split",
        "Pad",
    )
    """Operators whose inputs and outputs must have one scale and zero point."""


# --- operator rules --------------------------------------------------------------------------------------

RULE_FIELDS: dict[str, str] = {
    "kernel_h": "kernel height",
    "kernel_w": "kernel width",
    "kernel_area": "kernel height times width",
    "stride_h": "vertical stride",
    "stride_w": "horizontal stride",
    "dilation_h": "vertical dilation",
    "dilation_w": "horizontal dilation",
    "group": "number of groups",
    "depthwise": "depthwise convolution",
    "ifm_channels": "input channels",
    "ofm_channels": "output channels",
    "ifm_h": "input height",
    "ifm_w": "input width",
    "ofm_h": "output height",
    "ofm_w": "output width",
    "batch": "batch size",
    "rank": "number of dimensions",
    "constant_weights": "weights known at compile time",
    "symmetric_weights": "weights with zero point 0",
    "broadcast": "operands of different shapes",
    "padded": "padding",
    "pad_counted": "padding counted in the average",
    "elements": "elements of the output",
    "reduced": "elements under the reduction",
    "function": "function of the lookup table",
    "mode": "interpolation mode",
}
"""What a rule's `where` may speak of, with the words used in a refusal."""

FactValue = int | bool | str


class Bound(Spec):
    """One constraint: `1..3`, `<= 64`, `>= 2`, an exact value, or a list of values."""

    low: int | None = None
    high: int | None = None
    values: tuple[FactValue, ...] | None = None
    text: str

    @model_validator(mode="before")
    @classmethod
    def parse(cls, data: object) -> object:
        if isinstance(data, dict):
            return data
        if isinstance(data, bool | int):
            return {"values": (data,), "text": str(data).lower()}
        if isinstance(data, list | tuple):
            return {"values": tuple(data), "text": " or ".join(str(item) for item in data)}
        if isinstance(data, str):
            if span := re.fullmatch(r"\s*(\d+)\s*\.\.\s*(\d+)\s*", data):
                return {"low": int(span.group(1)), "high": int(span.group(2)), "text": data.strip()}
            if limit := re.fullmatch(r"\s*(<=|>=)\s*(\d+)\s*", data):
                return {
                    "high" if limit.group(1) == "<=" else "low": int(limit.group(2)),
                    "text": data.strip(),
                }
            return {"values": (data,), "text": data}
        raise ValueError(f"{data!r} is not a constraint; write 1..3, <= 64, >= 2, a value or a list of values")

    def admits(self, value: FactValue) -> bool:
        if self.values is not None:
            return value in self.values
        assert isinstance(value, int)
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)


class OpRule(Spec):
    """The engine runs these operators when every constraint holds. The first matching rule wins."""

    ops: tuple[str, ...]
    engine: str
    precisions: tuple[str, ...] = ("int8",)
    """Admitted precisions: "int8*int8" for operators with weights, "int8" otherwise."""
    where: Mapping[str, Bound] = {}
    note: str = ""

    @model_validator(mode="after")
    def known_fields(self) -> "OpRule":
        for field in self.where:
            if field not in RULE_FIELDS:
                raise ValueError(f"unknown constraint {field!r}; known are {', '.join(RULE_FIELDS)}")
        return self


@dataclass(frozen=True)
class OpFacts:
    """What a rule may ask about one operator: its standard ONNX name, precision, and `RULE_FIELDS` values.

    Integer operators go by their ONNX names too: QConv is "Conv", QAdd is "Add" or "Sub", QLookup "Lookup",
    QRequantize "Requantize". A fact that makes no sense for the operator is absent, and a constraint on it
    does not apply.
    """

    op: str
    precision: str
    facts: Mapping[str, FactValue]


@dataclass(frozen=True)
class Match:
    rule: OpRule
    engine: str


@dataclass(frozen=True)
class Refusal:
    """Why no rule took the operator: one sentence."""

    reason: str


# --- host and accelerator ----------------------------------------------------------------------------------


class Crossing(Spec):
    """What handing a region over between host and accelerator costs, beside moving its tensors."""

    sync: Duration
    bandwidth: Bandwidth


class Host(Spec):
    """The CPU: a target by itself, and what runs everything the accelerator refuses."""

    tvm_target: Mapping[str, str | int | tuple[str, ...]]
    """A TVM target dict, e.g. {kind: llvm, mtriple: aarch64-linux-gnu, mattr: [+neon, +dotprod]}.
    {kind: llvm} without more means the machine qcompile runs on, its features detected."""
    clock: Hertz
    threads: int = Field(default=1, ge=1)
    mac_rate: Mapping[str, MacRate]
    """MACs per host cycle and thread by precision pair, "float32" included; for estimates."""
    element_rate: ElementRate
    mac_energy: Picojoules
    byte_energy: PicojoulesPerByte


class Npu(Spec):
    """The accelerator. Memories, DMA paths and engines by name."""

    clock: Hertz
    memories: Mapping[str, Memory]
    dma: Mapping[str, Dma]
    engines: Mapping[str, Engine]
    rules: tuple[OpRule, ...]
    idle_power: Watts
    crossing: Crossing
    channel_alignment: int = Field(default=1, ge=1)
    """Feature map depth is rounded up to this in cost estimates and in scratchpad."""

    @model_validator(mode="after")
    def consistent(self) -> "Npu":
        kinds = [memory.kind for memory in self.memories.values()]
        if kinds.count("scratchpad") != 1 or kinds.count("external") != 1:
            raise ValueError("memories need exactly one of kind scratchpad and one of kind external")
        for rule in self.rules:
            if rule.engine not in self.engines:
                raise ValueError(
                    f"a rule for {', '.join(rule.ops)} names the engine {rule.engine!r}, which is not there"
                )
        return self

    @property
    def scratchpad(self) -> Memory:
        return next(memory for memory in self.memories.values() if memory.kind == "scratchpad")

    @property
    def external(self) -> Memory:
        return next(memory for memory in self.memories.values() if memory.kind == "external")


class Target(Spec):
    """One chip: a host CPU and, usually, an accelerator."""

    name: str
    description: str
    sources: tuple[str, ...]
    """Where the figures come from."""
    quantization: Quantization
    host: Host
    npu: Npu | None = None

    def match(self, facts: OpFacts) -> Match | Refusal:
        """Which rule of the accelerator takes an operator, or why none does."""
        if self.npu is None:
            return Refusal("this target has no accelerator")
        candidates = [rule for rule in self.npu.rules if facts.op in rule.ops]
        if not candidates:
            return Refusal(f"{self.name} has no rule for {facts.op}")
        reasons: list[str] = []
        for rule in candidates:
            reason = _refusal(rule, facts)
            if reason is None:
                return Match(rule, rule.engine)
            reasons.append(reason)
        return Refusal("; or ".join(dict.fromkeys(reasons)))


def _refusal(rule: OpRule, facts: OpFacts) -> str | None:
    if facts.precision not in rule.precisions:
        return f"{facts.op} in {facts.precision} is not among {', '.join(rule.precisions)}"
    for field, bound in rule.where.items():
        value = facts.facts.get(field)
        if value is not None and not bound.admits(value):
            shown = {True: "yes", False: "no"}.get(value, value) if isinstance(value, bool) else value
            return f"{RULE_FIELDS[field]} is {shown}, the rule for {facts.op} admits {bound.text}"
    return None

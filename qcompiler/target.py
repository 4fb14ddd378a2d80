"""The chip as data: the typed form of a target spec.

Everything the compiler knows about hardware is asked of a `Target`; no code tests a target's name. The YAML
form, inheritance and error messages live in `qcompiler.target_loader`. Units are mandatory in YAML and are
parsed here into SI-like base units, named in each field's docstring.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from qcompiler import host_cpu
from qcompiler.quant.arithmetic import RequantizeVariant


def spec_error(message: str, *at: str | int) -> PydanticCustomError:
    """A validation error whose place is `at`, keys below the value being validated."""
    return PydanticCustomError("spec", "{message}", {"message": message, "at": at})


def did_you_mean(word: str, known: Mapping[str, object] | tuple[str, ...]) -> str:
    """ ", did you mean 'bandwidth'?" where something known is near, else the known words."""
    near = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f", did you mean {near[0]!r}?" if near else f"; known are {', '.join(sorted(known))}"


class Spec(BaseModel):
    """Frozen, and closed: an unknown key is an error that suggests the nearest known one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def no_unknown_key(cls, data: object) -> object:
        if isinstance(data, dict):
            for key in data:
                if key not in cls.model_fields:
                    raise spec_error(f"unknown key{did_you_mean(str(key), tuple(cls.model_fields))}", key)
        return data


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
    engine_bandwidth: Bandwidth | None = None
    """Of engines that read constants here in place, where that is less: they have fewer reads under way."""
    latency: Duration
    """Of a read, and of a write unless `write_latency` is given."""
    write_latency: Duration | None = None
    energy: Energy
    alignment: Bytes = 16
    burst: Bytes = 32
    ports: Literal["shared", "dual", "private"] = "shared"
    """Whose bytes share the bandwidth. shared: everyone's. dual: those of engines, and apart from them those of DMA.
    private: those of DMA only; each engine has a port of its own."""


class DmaPath(Spec):
    """Between which memories, by name. Written `flash -> sram`, or `dram <-> sram` for both ways."""

    source: str
    destination: str
    both_ways: bool = False

    @model_validator(mode="before")
    @classmethod
    def parse(cls, data: object) -> object:
        if isinstance(data, dict):
            return data
        match = re.fullmatch(r"\s*(\w+)\s*(<?->)\s*(\w+)\s*", data) if isinstance(data, str) else None
        if match is None:
            raise ValueError(f"{data!r} is not a path; write `flash -> sram` or `dram <-> sram`")
        return {"source": match.group(1), "destination": match.group(3), "both_ways": match.group(2) == "<->"}

    def joins(self, source: str, destination: str) -> bool:
        ways = {(self.source, self.destination)} | ({(self.destination, self.source)} if self.both_ways else set())
        return (source, destination) in ways

    def __str__(self) -> str:
        return f"{self.source} {'<->' if self.both_ways else '->'} {self.destination}"


class Dma(Spec):
    """One copy engine; copies on one channel run in order, beside the compute engines and other DMA."""

    paths: tuple[DmaPath, ...] = Field(min_length=1)
    channels: int = Field(ge=1)
    bandwidth: Bandwidth
    setup: Duration

    def writes(self, memory: str) -> bool:
        return any(path.destination == memory or (path.both_ways and path.source == memory) for path in self.paths)


MicroBlockOp = Literal["conv", "pointwise", "depthwise", "pool"]
"""pointwise: convolutions with a kernel of one element, depth first; conv: all."""


class MicroBlock(Spec):
    """A micro-block that an array may work in, and for which operators."""

    shape: tuple[int, int, int]
    """OFM height, width, depth."""
    ops: tuple[MicroBlockOp, ...] = Field(min_length=1)
    wide_ops: tuple[MicroBlockOp, ...] = ()
    """For feature maps of 16 bits, if others."""
    ifm_block_depth: int | None = Field(default=None, ge=8)
    """Most input channels of a block of a convolution with this one, if others than the array's."""
    ifm_units: tuple[tuple[int, int, int], ...] = ()
    """IFM blocks of a convolution are multiples of one of three: rows, columns, and groups of 16 bytes of channels,
    where a block has up to 16 bytes of channels, up to 32, or more."""


class KernelFirst(Spec):
    """When a convolution's products go kernel elements first: the granules by which both orders are rated.

    V, ChooseKernelFirst in ethosu/regor/architecture/ethosu85/ethos_u85.cpp.
    """

    elements: int = Field(ge=1)
    """Kernel elements of a whole step."""
    least: int = Field(ge=1)
    """Kernel elements that the last step counts as, at least."""
    depth: int = Field(ge=1)
    """Input channels of a step in that order."""
    deep: int = Field(ge=1)
    """Input channels of a step in the other."""


class WideMaps(Spec):
    """What is different of a MAC array when feature maps have 16 bits."""

    ifm_block_depth: int = Field(default=16, ge=4)
    """Most input channels of a block of a convolution."""
    step_cycles: float = 1
    """How many times longer a depth-first step over as many channels takes."""
    accumulator_bits: int = Field(default=40, ge=32)
    """That the sum of products takes in the accumulators' memory."""
    pipeline_delay: int = 2
    """As `MacArray.pipeline_delay`."""
    delays_rows: bool = False
    """Whether a block one micro-block high or wide, and several deep, waits as well."""
    output_cycles: float | None = None
    """Of the output stage for an element of 16 bits, where its width decides and not the operator."""


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
    micro_blocks: tuple[MicroBlock, ...] = ()
    """Where the array has several: the one that exceeds the OFM least is used. `ublock` then rounds IFM blocks only."""
    kernel_first: KernelFirst | None = None
    """None: as the Ethos-U55 decides."""
    ifm_block_depth: int = Field(default=32, ge=8)
    """Input channels of a block of a convolution, depth first."""
    ifm_depth_step: int = Field(default=32, ge=8)
    """Input channels count as a multiple of this in depth-first order; 8 take a cycle."""
    weight_decoders: int = Field(default=1, ge=1)
    cores: int = Field(default=1, ge=1)
    accumulator_banks: int
    own_accumulator_banks: int = Field(default=0, ge=0)
    """Banks of a memory for accumulators alone, the others being for feature maps; 0: all are shared."""
    accumulator_depth: int = Field(default=8, ge=1)
    """Channels that accumulators are kept for are a multiple of this."""
    scale_rate: float = Field(default=0, ge=0)
    """Bytes a cycle of scale records, read again for each plane of blocks; 0: as fast as needed."""
    bank_size: Bytes
    granules: tuple[int, ...]
    """Bank granularity: IFM8, IFM16, IFM8 elementwise, IFM16 elementwise, IFM32, Acc16, Acc32, Acc40."""
    output_cycles: tuple[float, ...]
    """unary i32, binary i32, multiply to i32, multiply, simple add, add/subtract with rescale, max pool, other."""
    activation_cycles: tuple[float, float, float]
    """lookup table, ReLU-like clamp, none."""
    subkernel_max: tuple[int, int] = (8, 8)
    """Larger kernels, height and width, are run as several of at most this size."""
    pool_cycles: float = 4
    """Cycles per micro-block and window element of a pool on 8-bit inputs; 16-bit ones take twice as many."""
    pipeline_delay: int = 2
    """Cycles between dependent steps that a block of a single micro-block waits."""
    wide: WideMaps = WideMaps()
    reserved_banks: int = Field(default=2, ge=0)
    """Banks taken by the output buffer."""
    reserved_end_banks: int = Field(default=0, ge=0)
    """Banks at the end that feature maps may not use; a lookup table needs 2 whatever this says."""
    brick_depth: int = Field(default=0, ge=0)
    """Channels that feature maps are stored in planes of, as far as bursts go; 0: none, NHWC."""

    @model_validator(mode="after")
    def complete(self) -> Self:
        for name, wanted in (("granules", 8), ("output_cycles", 8)):
            if len(getattr(self, name)) != wanted:
                raise spec_error(f"needs {wanted} entries and has {len(getattr(self, name))}", name)
        return self


class Systolic(Spec):
    """A rows × cols systolic array fed from the scratchpad."""

    kind: Literal["systolic"]
    rows: int = Field(ge=1)
    cols: int = Field(ge=1)
    dataflow: Literal["weight_stationary", "output_stationary"]


class DotArray(Spec):
    """Dot products side by side: every cycle, `channels` inputs of one pixel with `kernels` filters (NVDLA, VTA)."""

    kind: Literal["dot_array"]
    channels: int = Field(ge=1)
    """Input channels of one dot product."""
    kernels: int = Field(ge=1)
    """Output channels at a time."""
    image_channels: int = Field(default=0, ge=0)
    """Input channels up to which a kernel row counts as one pixel of more channels, as images are laid out."""


class Simd(Spec):
    """A vector unit: elementwise, pooling, lookup, softmax."""

    kind: Literal["simd"]
    lanes: int = Field(ge=1)
    element_rate: Mapping[str, ElementRate]
    """Elements per cycle by operator class: elementwise, pool, lookup, softmax, resize."""


EngineGeometry = Annotated[MacArray | Systolic | DotArray | Simd, Field(discriminator="kind")]


class MacPrecision(Spec):
    """What a multiply-accumulate of one precision pair costs. rate counts the whole engine."""

    rate: MacRate
    energy: Picojoules


DTYPES: tuple[str, ...] = ("int1", "int2", "int4", "uint4", "int8", "uint8", "int16", "int32", "float32")
"""The types a precision is written with, as in "int8", "uint8*int8" or "int16->int8"; int1: weights of -1 and 1."""


def check_precision(precision: str, *at: str | int) -> None:
    for dtype in precision.replace("->", "*").split("*"):
        if dtype not in DTYPES:
            raise spec_error(f"{dtype!r} is not a type{did_you_mean(dtype, DTYPES)}", *at)


class Sparsity(Spec):
    """Zero weights that the engine skips."""

    pattern: Literal["2:4"]
    """Two of every four neighbours along the input channels are zero, which holds of any weights with one or two
    channels; depthwise and grouped convolutions have none."""
    speedup: float = Field(gt=1)
    """How many times faster multiplications are; so many times fewer are done, and paid for in energy."""
    precisions: tuple[str, ...]
    """Pairs it holds for."""


class Engine(Spec):
    geometry: EngineGeometry
    precisions: Mapping[str, MacPrecision] = {}
    """By pair, activation*weight: "int8*int8", "int16*int8", "int8*int4"…"""
    issue: Duration = Duration(value=0, unit="cycles")
    """Fixed cost of starting one command."""
    sparsity: Sparsity | None = None

    @model_validator(mode="after")
    def known_precisions(self) -> Self:
        for precision in self.precisions:
            check_precision(precision, "precisions", precision)
        for index, precision in enumerate(self.sparsity.precisions if self.sparsity is not None else ()):
            if precision not in self.precisions:
                raise spec_error(f"the engine has no rate for {precision!r}", "sparsity", "precisions", index)
        return self


# --- quantization ---------------------------------------------------------------------------------------


ActivationType = Literal["int8", "uint8", "int16"]
ACTIVATION_TYPES: tuple[str, ...] = get_args(ActivationType)


class ActivationFormat(Spec):
    dtypes: tuple[ActivationType, ...]
    symmetric: bool = False


StoredWeightType = Literal["int8", "uint8", "int4", "int2", "int1"]
WEIGHT_TYPES: tuple[str, ...] = get_args(StoredWeightType)


class WeightFormat(Spec):
    dtypes: tuple[StoredWeightType, ...]
    symmetric: bool = True
    per_channel: bool = True
    narrow_range: bool = True
    group_multiple: int | None = Field(default=None, ge=1)
    """Weights of less than 8 bits may share scales in groups along the input channels, of any multiple of so many: a
    small whole factor a group makes 8-bit weights of them as they are loaded (`arithmetic.scaled_codes`). None: the
    chip has no groups."""


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

    def lacks(self, facts: "OpFacts") -> str | None:
        """The first type of an operator that is not listed here, though it might be, or None.

        A chip that extends another may have fewer types and the same rules.
        """
        inputs, _, result = facts.asked.partition("->")
        activation, _, weights = inputs.partition("*")
        for dtype in (activation, result):
            if dtype in ACTIVATION_TYPES and dtype not in self.activations.dtypes:
                return f"{dtype} activations"
        computed = facts.facts.get("constant_weights") is False
        known, listed = (ACTIVATION_TYPES, self.activations.dtypes) if computed else (WEIGHT_TYPES, self.weights.dtypes)
        return f"{weights} weights" if weights in known and weights not in listed else None


# --- operator rules --------------------------------------------------------------------------------------

WEIGHTED_OPS: tuple[str, ...] = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators of multiply-accumulates, whose precision is a pair."""

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
    "scale_h": "vertical resize factor",
    "scale_w": "horizontal resize factor",
}
"""What a rule's `where` may speak of, with the words used in a refusal."""

FactValue = int | bool | str


class Bound(Spec):
    """One constraint: `1..3`, `..64` or `<= 64`, `2..` or `">= 2"`, an exact value, or a list of values.

    (YAML wants quotes around a leading `>`.)
    """

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
            shown = {True: "yes", False: "no"}.get(data, str(data)) if isinstance(data, bool) else str(data)
            return {"values": (data,), "text": shown}
        if isinstance(data, list | tuple):
            return {"values": tuple(data), "text": " or ".join(str(item) for item in data)}
        if isinstance(data, str):
            if span := re.fullmatch(r"\s*(\d*)\s*\.\.\s*(\d*)\s*", data):
                low, high = (int(end) if end else None for end in span.groups())
                if low is not None and high is not None and low > high:
                    raise ValueError(f"{data.strip()} admits nothing")
                return {"low": low, "high": high, "text": data.strip()}
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
        if isinstance(value, str):
            # A factor that is not whole ("1.5") lies in no range of whole numbers.
            return False
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)


class OpRule(Spec):
    """The engine runs these operators when every constraint holds. The first matching rule wins."""

    ops: tuple[str, ...]
    engine: str
    precisions: tuple[str, ...] = ("int8",)
    """Admitted precisions: "int8*int8" for operators with weights, "int8" otherwise; "int8->int16", "int16*int8->int8"
    where the output is of another width than the input."""
    where: Mapping[str, Bound] = {}
    note: str = ""

    @model_validator(mode="after")
    def known_words(self) -> Self:
        for field in self.where:
            if field not in RULE_FIELDS:
                raise spec_error(f"unknown constraint{did_you_mean(field, RULE_FIELDS)}", "where", field)
        for index, precision in enumerate(self.precisions):
            check_precision(precision, "precisions", index)
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
    """Of the inputs."""
    facts: Mapping[str, FactValue]
    narrow: str | None = None
    """The precision with an activation of four bits, of a product whose 8-bit activation uses no more."""
    result: str = ""
    """The output's type, if it is of another width than the input's."""

    @property
    def asked(self) -> str:
        """The precision as a rule has to list it."""
        return f"{self.precision}->{self.result}" if self.result else self.precision

    def among(self, precisions: Collection[str]) -> str | None:
        """The precision under which the operator is priced: the narrow one if there is a choice."""
        return next((name for name in (self.narrow, self.precision) if name in precisions), None)

    def admitted(self, precisions: Collection[str]) -> bool:
        """Whether a rule that lists these takes the operator."""
        narrow = f"{self.narrow}->{self.result}" if self.result else self.narrow
        return self.asked in precisions or narrow in precisions


AcceleratorName = Literal["npu", "dsp", "gpu"]
Backend = Literal["cpu", "npu", "dsp", "gpu"]
"""Where an operator can run."""


@dataclass(frozen=True)
class Match:
    rule: OpRule
    engine: str
    accelerator: AcceleratorName


@dataclass(frozen=True)
class Refusal:
    """Why no rule took the operator: one sentence."""

    reason: str


# --- host and accelerator ----------------------------------------------------------------------------------


class Crossing(Spec):
    """What handing a region over between host and accelerator costs, beside moving its tensors."""

    sync: Duration
    bandwidth: Bandwidth


class BareMetal(Spec):
    """How C code for a chip without an operating system is built, and where it can be tried."""

    compiler: str
    """The C compiler: GNU's, e.g. arm-none-eabi-gcc, or clang."""
    compiler_package: str
    """The Debian packages that hold it and its C library."""
    archiver: str | None = None
    """Unless given, the -ar that stands beside a GNU compiler."""
    size_tool: str | None = None
    """Unless given, the -size that stands beside a GNU compiler."""
    tools: Mapping[str, str] = {}
    """Other programs that building takes, such as ld.lld, and the Debian package of each."""
    flags: tuple[str, ...]
    """Compiler and linker flags that name the CPU and its calling convention."""
    libraries: tuple[str, ...] = ("-lm",)
    """What the example program is linked with, after the model."""
    board: str
    """Start-up code, linker script and console: a folder of runtime_stubs/baremetal."""
    emulator: tuple[str, ...]
    """The command that runs the program; its path follows."""
    emulator_package: str


class Host(Spec):
    """The CPU: a target by itself, and what runs everything the accelerator refuses."""

    tvm_target: Mapping[str, str | int | tuple[str, ...]]
    """A TVM target dict, e.g. {kind: llvm, mtriple: aarch64-linux-gnu, mattr: [+neon, +dotprod]}.
    {kind: llvm} without more means the machine qcompile runs on, its features detected."""
    clock: Hertz
    threads: int = Field(default=1, ge=1)
    mac_rate: Mapping[str, MacRate]
    """MACs per host cycle and thread by precision pair, "float32" included; for estimates."""
    mac_rate_with: Mapping[str, Mapping[str, MacRate]] = {}
    """Rates that hold instead if the CPU has an LLVM feature ("avx512vnni"); the first it has wins."""
    element_rate: ElementRate
    mac_energy: Picojoules
    byte_energy: PicojoulesPerByte
    bare_metal: BareMetal | None = None
    """Needed for `--emit c`."""

    @model_validator(mode="after")
    def has_rates(self) -> Self:
        if "float32" not in self.mac_rate:
            raise spec_error("needs a rate for float32, which every fallback operator may use", "mac_rate")
        return self

    @property
    def is_this_machine(self) -> bool:
        """Whether the spec leaves the CPU to be detected: `{kind: llvm}` and nothing more about the chip."""
        return self.tvm_target.get("kind") == "llvm" and not {"mcpu", "mtriple", "mattr"} & set(self.tvm_target)

    @property
    def loads_libraries(self) -> bool:
        """Whether a shared library can be made for the CPU: TVM makes machine code for it, and it has a system."""
        triple = str(self.tvm_target.get("mtriple", "")).split("-")
        return self.tvm_target.get("kind") == "llvm" and "none" not in triple

    def resolved_tvm_target(self) -> Mapping[str, str | int | tuple[str, ...]]:
        """The TVM target dict to build for, the machine's own CPU filled in where the spec leaves it open."""
        if not self.is_this_machine:
            return self.tvm_target
        cpu = host_cpu.detect()
        masked = {"mattr": tuple(f"-{name}" for name in cpu.masked)} if cpu.masked else {}
        return {**self.tvm_target, "mcpu": cpu.mcpu, **masked}

    def features(self) -> frozenset[str]:
        """LLVM features of the CPU: what LLVM knows of its mcpu and mattr, or detected on this machine."""
        if self.is_this_machine:
            return host_cpu.detect().features
        from tvm.target import Target as TvmTarget
        from tvm.target import codegen

        described = {key: list(item) if isinstance(item, tuple) else item for key, item in self.tvm_target.items()}
        found = frozenset(str(name) for name in codegen.llvm_get_cpu_features(TvmTarget(described)))
        mattr = self.tvm_target.get("mattr", ())
        assert isinstance(mattr, tuple)
        removed = {name[1:] for name in mattr if name.startswith("-")}
        return (found | {name[1:] for name in mattr if name.startswith("+")}) - removed

    def rates(self) -> Mapping[str, float]:
        """MACs per cycle and thread by precision pair, on the CPU this target has."""
        if self.mac_rate_with:
            features = self.features()
            for feature, rates in self.mac_rate_with.items():
                if feature in features:
                    return {**self.mac_rate, **rates}
        return self.mac_rate


class Accelerator(Spec):
    """What the compiler asks of every accelerator, however it is driven."""

    clock: Hertz
    rules: tuple[OpRule, ...]
    idle_power: Watts
    crossing: Crossing
    channel_alignment: int = Field(default=1, ge=1)
    """Feature map depth is rounded up to this in cost estimates and in memory."""

    def match(self, facts: OpFacts, chip: str) -> OpRule | Refusal:
        """The first rule that takes an operator, or why none does; `chip` is the name a refusal may give."""
        candidates = [rule for rule in self.rules if facts.op in rule.ops]
        if not candidates:
            return Refusal(f"{chip} has no rule for {facts.op}")
        reasons: list[str] = []
        for rule in candidates:
            reason = _refusal(rule, facts)
            if reason is None:
                return rule
            reasons.append(reason)
        return Refusal("; or ".join(dict.fromkeys(reasons)))


class Npu(Accelerator):
    """Engines that compute from a scratchpad which DMA fills: an NPU, or a DSP with tightly coupled memory.

    A driver feeds it commands through `runtime_stubs/abi/qrt.h`. Memories, DMA paths and engines go by name.
    """

    memories: Mapping[str, Memory]
    dma: Mapping[str, Dma]
    engines: Mapping[str, Engine]
    weight_code: Literal["plain", "golomb_rice"] = "plain"
    """How constant int8 weights are kept in memory; the engines decode them as fast as they read them."""
    keeps_feature_maps: bool = True
    """Whether feature maps may stay in the scratchpad between operators; else each goes out to external memory."""
    rolling_buffers: bool = False
    """Whether engines follow feature maps whose rows wrap around a buffer, so that operators can run as cascades."""
    reads_constants_in_place: bool = False
    """Whether engines reach the constants' memory themselves, for what is read only once; else DMA brings all in."""

    @model_validator(mode="after")
    def consistent(self) -> Self:
        kinds = [memory.kind for memory in self.memories.values()]
        if kinds.count("scratchpad") != 1 or kinds.count("external") != 1:
            raise spec_error("needs exactly one of kind scratchpad and one of kind external", "memories")
        if kinds.count("flash") > 1:
            raise spec_error("may hold one flash only", "memories")
        for index, rule in enumerate(self.rules):
            if rule.engine not in self.engines:
                raise spec_error(
                    f"no engine {rule.engine!r}{did_you_mean(rule.engine, self.engines)}", "rules", index, "engine"
                )
            self._check_engine(index, rule)
        for name, dma in self.dma.items():
            for index, path in enumerate(dma.paths):
                for memory in (path.source, path.destination):
                    if memory not in self.memories:
                        hint = did_you_mean(memory, self.memories)
                        raise spec_error(f"no memory {memory!r}{hint}", "dma", name, "paths", index)
        inside, outside = self.memory_name("scratchpad"), self.memory_name("external")
        for ends in ((outside, inside), (inside, outside)):
            if self.path_between(*ends) is None:
                raise spec_error(f"needs a path {ends[0]} -> {ends[1]}", "dma")
        if "flash" in kinds and self.path_between(self.memory_name("flash"), inside) is None:
            raise spec_error(f"needs a path {self.memory_name('flash')} -> {inside}", "dma")
        return self

    def _check_engine(self, index: int, rule: OpRule) -> None:
        """An engine must be able to run, and the cost model to price, what the rule sends it."""
        engine = self.engines[rule.engine]
        for position, op in enumerate(rule.ops):
            if op not in WEIGHTED_OPS:
                if isinstance(engine.geometry, Systolic | DotArray):
                    kind = "systolic array" if isinstance(engine.geometry, Systolic) else "dot array"
                    raise spec_error(
                        f"a {kind} runs {', '.join(WEIGHTED_OPS)} only, not {op}",
                        "rules",
                        index,
                        "ops",
                        position,
                    )
                continue
            for place, precision in enumerate(rule.precisions):
                if precision.partition("->")[0] not in engine.precisions:
                    raise spec_error(
                        f"the engine {rule.engine!r} has no rate for {precision!r}", "rules", index, "precisions", place
                    )

    def memory_name(self, kind: Literal["external", "scratchpad", "flash"]) -> str:
        """The name of the memory of this kind; there must be one."""
        return next(name for name, memory in self.memories.items() if memory.kind == kind)

    @property
    def weight_memory(self) -> str:
        """Where constants live: the flash if there is one, else the external memory."""
        has_flash = any(memory.kind == "flash" for memory in self.memories.values())
        return self.memory_name("flash" if has_flash else "external")

    def path_between(self, source: str, destination: str) -> str | None:
        """The name of the first DMA that copies from one memory to the other, or None."""
        for name, dma in self.dma.items():
            if any(path.joins(source, destination) for path in dma.paths):
                return name
        return None

    @property
    def scratchpad(self) -> Memory:
        return next(memory for memory in self.memories.values() if memory.kind == "scratchpad")

    @property
    def external(self) -> Memory:
        return next(memory for memory in self.memories.values() if memory.kind == "external")


class GpuMemory(Spec):
    """The memory a GPU computes from, which may be the host's own."""

    size: Bytes
    bandwidth: Bandwidth
    energy: Energy


class GpuEngine(Spec):
    """One way of computing on all compute units: their vector lanes, dot product instructions, matrix units."""

    precisions: Mapping[str, MacPrecision] = {}
    """By pair, activation*weight; the rate counts the whole GPU."""
    element_rate: ElementRate
    """Elements per cycle of the whole GPU for operators that do not multiply and accumulate."""

    @model_validator(mode="after")
    def known_precisions(self) -> Self:
        for precision in self.precisions:
            check_precision(precision, "precisions", precision)
        return self


class Gpu(Accelerator):
    """An accelerator that runs kernels: one launch per operator, everything in one memory. Engines go by name."""

    api: Literal["opencl", "cuda"]
    architectures: tuple[str, ...] = ()
    """What code is made for, e.g. sm_75 and sm_90 with CUDA; with OpenCL the driver compiles."""
    features: tuple[str, ...] = ()
    """What kernels may use beside the API's core, e.g. dp4a, mma, cl_khr_integer_dot_product."""
    compute_units: int = Field(ge=1)
    local_memory: Bytes
    """Shared by the work items of one group, per compute unit."""
    memory: GpuMemory
    engines: Mapping[str, GpuEngine]
    launch: Duration
    """Fixed cost of one kernel."""

    @model_validator(mode="after")
    def consistent(self) -> Self:
        for index, rule in enumerate(self.rules):
            if rule.engine not in self.engines:
                raise spec_error(
                    f"no engine {rule.engine!r}{did_you_mean(rule.engine, self.engines)}", "rules", index, "engine"
                )
            rates = self.engines[rule.engine].precisions
            for place, precision in enumerate(rule.precisions):
                if precision.partition("->")[0] not in rates and any(op in WEIGHTED_OPS for op in rule.ops):
                    raise spec_error(
                        f"the engine {rule.engine!r} has no rate for {precision!r}", "rules", index, "precisions", place
                    )
        return self


class VelaConfig(Spec):
    """How Arm's Vela compiler knows the chip. The names are those of its own options and of its Arm/vela.ini."""

    accelerator: str
    """`--accelerator-config`, "ethos-u55-128" for one."""
    system_config: str
    memory_mode: str


class Emit(Spec):
    """Other compilers that make code for the accelerator (`qcompile --emit`)."""

    vela: VelaConfig | None = None


class Target(Spec):
    """One chip: a host CPU and, usually, accelerators."""

    name: str
    description: str
    sources: tuple[str, ...] = Field(min_length=1)
    """Where the figures come from."""
    quantization: Quantization
    host: Host
    npu: Npu | None = None
    dsp: Npu | None = None
    """A second accelerator of the same kind, with its own memories: a vector DSP beside an NPU."""
    gpu: Gpu | None = None
    emit: Emit = Emit()

    @property
    def accelerators(self) -> Mapping[AcceleratorName, Npu | Gpu]:
        """Those the chip has, in the order in which they are asked."""
        units: tuple[tuple[AcceleratorName, Npu | Gpu | None], ...] = (
            ("npu", self.npu), ("dsp", self.dsp), ("gpu", self.gpu),
        )  # fmt: skip
        return {name: unit for name, unit in units if unit is not None}

    def alone(self, name: AcceleratorName) -> "Target":
        """The chip as a driver of one scratchpad accelerator sees it: that one is its `npu`, and there is no other."""
        unit = self.accelerators[name]
        assert isinstance(unit, Npu), f"{name} has no scratchpad"
        return self.model_copy(update={"npu": unit, "dsp": None, "gpu": None})

    def preferring(self, dtype: ActivationType) -> "Target":
        """The chip for a network whose activations are of a type that it has: the first of its list."""
        activations = self.quantization.activations
        assert dtype in activations.dtypes, f"{self.name} has no {dtype} activations"
        others = tuple(other for other in activations.dtypes if other != dtype)
        first = activations.model_copy(update={"dtypes": (dtype, *others)})
        return self.model_copy(update={"quantization": self.quantization.model_copy(update={"activations": first})})

    def match(self, facts: OpFacts) -> Match | Refusal:
        """Which accelerator's rule takes an operator first, or why none does."""
        reasons: dict[AcceleratorName, str] = {}
        for name in self.accelerators:
            match = self.match_on(name, facts)
            if isinstance(match, Match):
                return match
            reasons[name] = match.reason
        return Refusal(joined_reasons(reasons)) if reasons else Refusal("this target has no accelerator")

    def match_on(self, name: AcceleratorName, facts: OpFacts) -> Match | Refusal:
        """Which rule of one accelerator takes an operator, or why none does."""
        rule = self.accelerators[name].match(facts, self.name)
        if isinstance(rule, Refusal):
            return rule
        lacking = self.quantization.lacks(facts)
        return Match(rule, rule.engine, name) if lacking is None else Refusal(f"{self.name} has no {lacking}")


def joined_reasons(reasons: Mapping[AcceleratorName, str]) -> str:
    """Why none of several accelerators runs an operator; which of them says what only matters if they differ."""
    if len(set(reasons.values())) == 1:
        return next(iter(reasons.values()))
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def _refusal(rule: OpRule, facts: OpFacts) -> str | None:
    if not facts.admitted(rule.precisions):
        return f"{facts.op} in {facts.asked} is not among {', '.join(rule.precisions)}"
    for field, bound in rule.where.items():
        value = facts.facts.get(field)
        if value is not None and not bound.admits(value):
            shown = {True: "yes", False: "no"}.get(value, value) if isinstance(value, bool) else value
            return f"{RULE_FIELDS[field]} is {shown}, the rule for {facts.op} admits {bound.text}"
    return None

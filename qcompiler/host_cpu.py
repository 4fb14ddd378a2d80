"""What the CPU this program runs on can do, asked of LLVM and checked against the operating system."""

import platform
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")

HALF_CONVERSIONS = frozenset({"f16c", "avx512f", "neon", "fp16", "fullfp16"})
"""LLVM's names of features with instructions that make float32 of float16; bfloat16 takes a shift anywhere."""

# LLVM names a CPU model's features even where a hypervisor masks them; code using a masked one dies with
# SIGILL. Those that vector code may use are therefore looked up in /proc/cpuinfo. LLVM name, kernel's name.
_CHECKED_FEATURES: tuple[tuple[str, str], ...] = (
    ("avx", "avx"),
    ("avx2", "avx2"),
    ("fma", "fma"),
    ("f16c", "f16c"),
    ("avx512f", "avx512f"),
    ("avx512bw", "avx512bw"),
    ("avx512cd", "avx512cd"),
    ("avx512dq", "avx512dq"),
    ("avx512vl", "avx512vl"),
    ("avx512bf16", "avx512_bf16"),
    ("avx512bitalg", "avx512_bitalg"),
    ("avx512fp16", "avx512_fp16"),
    ("avx512ifma", "avx512ifma"),
    ("avx512vbmi", "avx512vbmi"),
    ("avx512vbmi2", "avx512_vbmi2"),
    ("avx512vnni", "avx512_vnni"),
    ("avx512vp2intersect", "avx512_vp2intersect"),
    ("avx512vpopcntdq", "avx512_vpopcntdq"),
    ("avxvnni", "avx_vnni"),
    ("avxvnniint8", "avx_vnni_int8"),
    ("amx-int8", "amx_int8"),
    ("gfni", "gfni"),
    ("vaes", "vaes"),
    ("vpclmulqdq", "vpclmulqdq"),
    ("dotprod", "asimddp"),
    ("i8mm", "i8mm"),
    ("sve", "sve"),
    ("sve2", "sve2"),
    ("fullfp16", "asimdhp"),
)


@dataclass(frozen=True)
class HostCpu:
    """A CPU as LLVM sees it."""

    mcpu: str
    """LLVM's name of the model, e.g. "znver4"."""
    features: frozenset[str]
    """LLVM feature names the CPU really has, e.g. "avx512vnni"."""
    masked: tuple[str, ...]
    """Features LLVM expects of the model and the operating system does not offer."""


@cache
def detect() -> HostCpu:
    """The CPU of this machine. Costs an import of TVM the first time."""
    from tvm.target import Target, codegen

    mcpu = codegen.llvm_get_system_cpu()
    expected = frozenset(str(name) for name in codegen.llvm_get_cpu_features(Target({"kind": "llvm", "mcpu": mcpu})))
    offered = kernel_flags()
    if offered is None:
        return HostCpu(mcpu, expected, ())
    masked = tuple(llvm for llvm, kernel in _CHECKED_FEATURES if llvm in expected and kernel not in offered)
    return HostCpu(mcpu, expected - frozenset(masked), masked)


def kernel_flags(cpuinfo: Path = _CPUINFO) -> frozenset[str] | None:
    """The CPU flags Linux lists, or None elsewhere (macOS, Windows), where LLVM's word has to do."""
    if not cpuinfo.is_file():
        return None
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo.read_text(encoding="utf-8", errors="replace"), re.M)
    return frozenset(found.group(1).split()) if found else None


def architecture() -> str:
    """The machine's architecture as LLVM spells it in a triple: x86_64, aarch64…"""
    machine = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


def flags_of(features: frozenset[str]) -> tuple[str, ...]:
    """Those of LLVM's features that the kernel lists as CPU flags, by its names, sorted."""
    return tuple(sorted(kernel for llvm, kernel in _CHECKED_FEATURES if llvm in features))


def why_not_here(built_for: str, flags: tuple[str, ...], cpuinfo: Path = _CPUINFO) -> str | None:
    """Why code cannot run on this machine, or None if it can. Needs nothing of TVM.

    Args:
        built_for: the code's architecture.
        flags: CPU flags it may use, from `flags_of`.
    """
    if built_for != architecture():
        return f"it is built for {built_for}, this machine is {architecture()}"
    offered = kernel_flags(cpuinfo)
    lacking = [flag for flag in flags if offered is not None and flag not in offered]
    return f"it uses {', '.join(lacking)}, which this CPU lacks" if lacking else None

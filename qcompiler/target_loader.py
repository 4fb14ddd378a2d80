"""Read target specs: YAML with inheritance into a `Target`, or an error that says file, line and column.

The file format is described in docs/target-specs.md. A spec `extends` another by name or by path; mappings
merge key by key, everything else replaces what it inherits, and `null` removes it. The section of an accelerator may
`extends` by itself, and takes over the section of the same kind of another spec. Overrides
("memories.sram.size=512KiB") come last, one value each.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from importlib import resources
from pathlib import Path

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from qcompiler.errors import QCompilerError
from qcompiler.target import Accelerator, Gpu, Npu, Target, did_you_mean

Scalar = str | int | float | bool | None
Plain = Scalar | list["Plain"] | dict[str, "Plain"]

ACCELERATORS: Mapping[str, type[Accelerator]] = {"npu": Npu, "dsp": Npu, "gpu": Gpu}
"""The sections of a spec that describe one."""
_OWN_KEYS = ("extends", "name", "description")
"""What a spec does not inherit."""
_RULE_OPS = ("Lookup", "Requantize")
"""Operators a rule may name beside those of ONNX."""


@dataclass(frozen=True)
class TargetSummary:
    """One line of the list of bundled targets."""

    name: str
    description: str


@dataclass(frozen=True)
class Place:
    """Where something stands, counted from 1; line 0 stands for all of an override."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


@dataclass(frozen=True)
class Node:
    """A YAML value, its place, and the place of the key it stands under."""

    value: "Scalar | Mapping[str, Node] | tuple[Node, ...]"
    place: Place
    key: Place

    def plain(self) -> Plain:
        if isinstance(self.value, Mapping):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, tuple):
            return [node.plain() for node in self.value]
        return self.value

    def child(self, key: str | int) -> "Node | None":
        if isinstance(self.value, Mapping):
            return self.value.get(str(key))
        if isinstance(self.value, tuple) and isinstance(key, int) and key < len(self.value):
            return self.value[key]
        return None


def load_target(name_or_path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Target:
    """The target of a bundled name ("arm-npu") or of a YAML file.

    Args:
        name_or_path: a bundled target, or a path.
        overrides: KEY=VALUE, such as "memories.sram.size=512KiB": dots lead into the spec, the name of the
            only accelerator may be left out, the value is YAML. They become part of the target's name.

    Raises:
        QCompilerError: no such target (the nearest is suggested), or anything wrong with the file, every
            problem on a line of its own with its place.
    """
    file = _locate(os.fspath(name_or_path))
    root = _resolve(file, ())
    assert isinstance(root.value, Mapping)
    fields = dict(root.value)
    fields.setdefault("name", Node(file.stem, root.place, root.place))
    spec = Node(fields, root.place, root.key)
    for override in overrides:
        spec = _override(spec, override)
    if overrides:
        spec = _renamed(spec, overrides)
    _report(_unknown_operators(spec))
    try:
        return Target.model_validate(spec.plain())
    except ValidationError as error:
        _report(_explain(spec, details) for details in _causes(error))
        raise AssertionError("a validation error without errors") from error


def list_targets() -> tuple[TargetSummary, ...]:
    """The bundled targets, by name."""
    return tuple(TargetSummary(name, _description(file)) for name, file in sorted(_bundled().items()))


def _description(file: Path) -> str:
    node = _parse(file).child("description")
    return str(node.value) if node is not None else ""


# --- finding and merging -------------------------------------------------------------------------------------


def _bundled() -> dict[str, Path]:
    folder = resources.files("qcompiler.target_specs")
    return {Path(file.name).stem: Path(str(file)) for file in folder.iterdir() if file.name.endswith(".yaml")}


def _looks_like_path(text: str) -> bool:
    return text.endswith((".yaml", ".yml")) or os.sep in text or "/" in text


def _locate(text: str) -> Path:
    if _looks_like_path(text):
        return Path(text)
    bundled = _bundled()
    if text in bundled:
        return bundled[text]
    near = get_close_matches(text, list(bundled), n=1, cutoff=0.5)
    suggestion = f"did you mean {near[0]!r}? Known are" if near else "known are"
    raise QCompilerError(
        f"unknown target {text!r}; {suggestion} {', '.join(sorted(bundled))}; a path to a YAML spec works too"
    )


def _resolve(file: Path, chain: tuple[Path, ...]) -> Node:
    """A spec merged onto everything it extends."""
    root = _sections_resolved(_parse(file), file, chain)
    parent = root.child("extends")
    if parent is None or parent.value is None:
        return _without(root, ("extends",))
    base = _without(_parent(file, parent, chain), _OWN_KEYS)
    merged = _merge(base, _without(root, ("extends",)))
    return _join_sources(base, root, merged)


def _parent(file: Path, parent: Node, chain: tuple[Path, ...]) -> Node:
    """The resolved spec that `extends` names."""
    if not isinstance(parent.value, str):
        raise QCompilerError(f"extends: needs the name or the path of one target ({parent.place})")
    parent_file = _locate_parent(file, parent.value, parent.place)
    seen = (*chain, file.resolve())
    if parent_file.resolve() in seen:
        circle = " -> ".join(step.name for step in (*seen[seen.index(parent_file.resolve()) :], parent_file))
        raise QCompilerError(f"extends: {circle} goes round in a circle ({parent.place})")
    return _resolve(parent_file, seen)


def _sections_resolved(root: Node, file: Path, chain: tuple[Path, ...]) -> Node:
    """The spec with accelerators that extend those of other specs merged onto them."""
    for name, kind in ACCELERATORS.items():
        section = root.child(name)
        parent = section.child("extends") if section is not None else None
        if section is None or parent is None:
            continue
        spec = _parent(file, parent, chain)
        base = next(
            (spec.child(other) for other, its in ACCELERATORS.items() if its is kind and spec.child(other)), None
        )
        if base is None:
            kinds = " or ".join(other for other, its in ACCELERATORS.items() if its is kind)
            raise QCompilerError(f"{name}.extends: {parent.value} has no {kinds} section ({parent.place})")
        assert isinstance(root.value, Mapping)
        merged = _merge(base, _without(section, ("extends",)))
        sources = spec.child("sources")
        inherited = {} if sources is None or root.child("sources") is not None else {"sources": sources}
        own = Node({**root.value, **inherited, name: merged}, root.place, root.key)
        root = _join_sources(spec, own, own)
    return root


def _locate_parent(file: Path, text: str, place: Place) -> Path:
    if not _looks_like_path(text):
        try:
            return _locate(text)
        except QCompilerError as error:
            raise QCompilerError(f"extends: {error} ({place})") from None
    path = file.parent / text
    if not path.is_file():
        raise QCompilerError(f"extends: there is no file {path} ({place})")
    return path


def _without(node: Node, keys: tuple[str, ...]) -> Node:
    assert isinstance(node.value, Mapping)
    return Node({key: item for key, item in node.value.items() if key not in keys}, node.place, node.key)


def _merge(base: Node, over: Node) -> Node:
    if not isinstance(base.value, Mapping) or not isinstance(over.value, Mapping) or _other_kind(base, over):
        return over
    merged = dict(base.value)
    for key, item in over.value.items():
        inherited = merged.pop(key, None)
        if item.value is not None:
            merged[key] = item if inherited is None else _merge(inherited, item)
    return Node(merged, over.place, over.key)


def _other_kind(base: Node, over: Node) -> bool:
    """A geometry of another kind has other keys: it replaces the inherited one instead of merging with it."""
    old, new = base.child("kind"), over.child("kind")
    return old is not None and new is not None and old.value != new.value


def _join_sources(base: Node, root: Node, merged: Node) -> Node:
    """Inherited figures keep their sources: `sources` alone among the lists is appended to."""
    old, new = base.child("sources"), root.child("sources")
    assert isinstance(merged.value, Mapping)
    if old is None or new is None or not isinstance(old.value, tuple) or not isinstance(new.value, tuple):
        return merged
    said = {str(node.value) for node in new.value}
    joined = Node((*new.value, *(node for node in old.value if str(node.value) not in said)), new.place, new.key)
    return Node({**merged.value, "sources": joined}, merged.place, merged.key)


# --- overriding ----------------------------------------------------------------------------------------------


def _override(spec: Node, text: str) -> Node:
    """The spec with one value replaced."""
    place = Place(f"--set {text}", 0, 0)
    key, equals, value = text.partition("=")
    steps = tuple(key.strip().split("."))
    if not equals or not all(steps):
        raise QCompilerError(f"--set {text}: write KEY=VALUE, such as memories.sram.size=512KiB")
    try:
        parsed = YAML(typ="rt").load(value)
    except YAMLError:
        raise QCompilerError(f"--set {text}: the value is not valid YAML") from None
    if steps[0] not in Target.model_fields:
        units = {name: unit for name, unit in ACCELERATORS.items() if spec.child(name) is not None}
        owners = [name for name, unit in units.items() if steps[0] in unit.model_fields]
        if not owners:
            known = {key: None for model in (Target, *units.values()) for key in model.model_fields}
            _report([Problem(steps[:1], f"unknown key{did_you_mean(steps[0], known)}", place)])
        if len(owners) > 1:
            choices = " or ".join(f"{name}.{'.'.join(steps)}" for name in owners)
            _report([Problem(steps, f"this target has several accelerators; say {choices}", place)])
        steps = (owners[0], *steps)
    return _replaced(spec, steps, (), _at(_node(parsed, "", place, place), place), place)


def _replaced(node: Node, steps: tuple[str, ...], path: tuple[str, ...], value: Node, place: Place) -> Node:
    """`node` with `value` below it. Only the last step may be new; whether it means anything the model judges."""
    step, rest = steps[0], steps[1:]
    below = node.child(int(step) if step.isdecimal() and isinstance(node.value, tuple) else step)
    if below is None and (rest or not isinstance(node.value, Mapping)):
        where = ".".join(path) or "the spec"
        known = tuple(node.value) if isinstance(node.value, Mapping) else ()
        hint = did_you_mean(step, known) if known else ""
        _report([Problem((*path, step), f"{where} has no {step!r}{hint}", place)])
    item = value if not rest or below is None else _replaced(below, rest, (*path, step), value, place)
    if isinstance(node.value, tuple):
        items = list(node.value)
        items[int(step)] = item
        return Node(tuple(items), node.place, node.key)
    assert isinstance(node.value, Mapping)
    if item.value is None:
        return _without(node, (step,))
    return Node({**node.value, step: item}, node.place, node.key)


def _at(node: Node, place: Place) -> Node:
    """The node with one place for all of it: an override's lines and columns are nobody's file."""
    if isinstance(node.value, Mapping):
        return Node({key: _at(item, place) for key, item in node.value.items()}, place, place)
    if isinstance(node.value, tuple):
        return Node(tuple(_at(item, place) for item in node.value), place, place)
    return Node(node.value, place, place)


def _renamed(spec: Node, overrides: Sequence[str]) -> Node:
    """A report or a bundle of a changed chip must not look like one of the chip itself."""
    name = spec.child("name")
    assert name is not None and isinstance(spec.value, Mapping)
    text = f"{name.value} with {', '.join(override.replace(' ', '') for override in overrides)}"
    return Node({**spec.value, "name": Node(text, name.place, name.key)}, spec.place, spec.key)


# --- reading --------------------------------------------------------------------------------------------------


def _parse(file: Path) -> Node:
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise QCompilerError(
            f"there is no target spec {file}; give a YAML file, or a bundled target ({', '.join(sorted(_bundled()))})"
        ) from None
    except OSError as error:
        raise QCompilerError(f"cannot read the target spec {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise QCompilerError(f"{file} is not a text file in UTF-8: byte {error.start} is {error.reason}") from None
    return _parsed(text, str(file))


@lru_cache(maxsize=64)
def _parsed(text: str, file: str) -> Node:
    """The parser that keeps places takes a tenth of a second and more; most specs are read again as parents."""
    try:
        tree = YAML(typ="rt").load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" ({file}:{mark.line + 1}:{mark.column + 1})" if mark is not None else f" ({file})"
        raise QCompilerError(f"not valid YAML: {error.problem or error.context}{place}") from None
    except YAMLError as error:
        raise QCompilerError(f"not valid YAML: {' '.join(str(error).split())} ({file})") from None
    start = Place(file, 1, 1)
    if not isinstance(tree, CommentedMap):
        raise QCompilerError(f"a target spec is a mapping such as `name: my-npu`, this is not ({start})")
    return _node(tree, file, start, start)


def _node(value: object, file: str, place: Place, key: Place) -> Node:
    if isinstance(value, CommentedMap):
        items: dict[str, Node] = {}
        for name, item in value.items():
            # Keys that came in through a YAML merge (<<) have no place of their own.
            own = name in value.lc.data
            at_key = _place(file, value.lc.key(name)) if own else place
            items[str(name)] = _node(item, file, _place(file, value.lc.value(name)) if own else place, at_key)
        return Node(items, place, key)
    if isinstance(value, CommentedSeq):
        places = [_place(file, value.lc.item(index)) for index in range(len(value))]
        return Node(
            tuple(_node(item, file, at, at) for item, at in zip(value, places, strict=True)),
            place,
            key,
        )
    if value is None or isinstance(value, bool):
        return Node(value, place, key)
    if isinstance(value, int):
        return Node(int(value), place, key)
    if isinstance(value, float):
        return Node(float(value), place, key)
    return Node(str(value), place, key)


def _place(file: str, position: tuple[int, int]) -> Place:
    return Place(file, position[0] + 1, position[1] + 1)


# --- explaining ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """One mistake: the path of keys to it, what is wrong, and where it stands."""

    path: tuple[str | int, ...]
    message: str
    place: Place

    def __str__(self) -> str:
        steps = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in self.path)
        return f"{steps.lstrip('.') or 'the spec'}: {self.message} ({self.place})"


def _report(problems: Iterable[Problem]) -> None:
    """Raise everything wrong, in the order of the file, if there is anything."""
    found = sorted(problems, key=lambda problem: (problem.place.file, problem.place.line, problem.place.column))
    if found:
        raise QCompilerError("\n".join(str(problem) for problem in found))


def _causes(error: ValidationError) -> list[ErrorDetails]:
    """Without what follows from another: a list counts as too short when its items are wrong."""
    places = [details["loc"] for details in error.errors()]
    return [
        details
        for details in error.errors()
        if not any(place != details["loc"] and place[: len(details["loc"])] == details["loc"] for place in places)
    ]


def _explain(spec: Node, details: ErrorDetails) -> Problem:
    location, kind = details["loc"], details["type"]
    context = details.get("ctx", {})
    if kind == "spec":
        node, path = _walk(spec, (*location, *context["at"]))
        on_key = context["message"].startswith("unknown")
        return Problem(path, context["message"], node.key if on_key else node.place)
    if kind == "missing":
        node, path = _walk(spec, location[:-1])
        return Problem((*path, str(location[-1])), "is missing", node.key)
    node, path = _walk(spec, location)
    return Problem(path, _message(node, details), node.place)


def _message(node: Node, details: ErrorDetails) -> str:
    context = details.get("ctx", {})
    shown = repr(node.value) if isinstance(node.value, str) else "this" if isinstance(node.value, tuple) else node.value
    match details["type"]:
        case "value_error":
            return str(context["error"])
        case "literal_error":
            return f"{shown} is not one of {context['expected']}"
        case "union_tag_invalid":
            return f"kind {context['tag']!r} is not one of {context['expected_tags']}"
        case "union_tag_not_found":
            return f"needs a kind ({_tags(details)})"
        case _:
            message = details["msg"]
            return message[0].lower() + message[1:]


def _tags(details: ErrorDetails) -> str:
    assert "kind" in str(details.get("ctx", {}).get("discriminator", "")), details
    return "mac_array, systolic, dot_array or simd"


def _walk(spec: Node, location: tuple[str | int, ...]) -> tuple[Node, tuple[str | int, ...]]:
    """The node at a pydantic location and its path; steps that are not in the file (union tags) are skipped."""
    node, path = spec, ()
    for step in location:
        below = node.child(step)
        if below is not None:
            node, path = below, (*path, step)
    return node, path


def _unknown_operators(spec: Node) -> Iterator[Problem]:
    """A misspelt operator would match nothing and send every node to the CPU without a word."""
    from onnx import defs

    for path, node in _operator_names(spec):
        op = node.value
        if isinstance(op, str) and op not in _RULE_OPS and not defs.has(op):
            names = {schema.name for schema in defs.get_all_schemas() if schema.domain == ""} | set(_RULE_OPS)
            near = get_close_matches(op, sorted(names), n=1, cutoff=0.6)
            hint = f", did you mean {near[0]!r}?" if near else ""
            yield Problem(path, f"there is no operator {op!r}{hint}", node.place)


def _operator_names(spec: Node) -> Iterator[tuple[tuple[str | int, ...], Node]]:
    lists: list[tuple[str | int, ...]] = [("quantization", "shared_scale")]
    for name in ACCELERATORS:
        rules, _ = _walk(spec, (name, "rules"))
        lists += [
            (name, "rules", index, "ops") for index in range(len(rules.value) if isinstance(rules.value, tuple) else 0)
        ]
    for path in lists:
        names, found = _walk(spec, path)
        if found == path and isinstance(names.value, tuple):
            yield from (((*path, index), name) for index, name in enumerate(names.value))

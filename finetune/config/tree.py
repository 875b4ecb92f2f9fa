"""YAML text -> plain values, with the line every value came from.

A safe loader with stricter rules than PyYAML's: duplicate keys are refused, `1e-4` is a number,
`yes`, `off`, `010` and dates are text (YAML 1.2), no tags, and no document that unfolds to
something huge through aliases.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

Path = tuple[str, ...]

MAX_NUM_CHARS = 1 << 18
MAX_NUM_NODES = 10_000
MAX_DEPTH = 16

_TAG = "tag:yaml.org,2002:"
_PLAIN_SCALARS = (
    ("null", re.compile(r"~|null|Null|NULL|"), "~nN"),
    ("bool", re.compile(r"true|True|TRUE|false|False|FALSE"), "tTfF"),
    ("int", re.compile(r"[-+]?[0-9]+"), "-+0123456789"),
    (
        "float",
        re.compile(
            r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
        ),
        "-+.0123456789",
    ),
)


class ConfigYamlLoader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalar rules above."""

    yaml_implicit_resolvers: dict[Any, Any] = {}


for _name, _pattern, _first in _PLAIN_SCALARS:
    _whole = re.compile(f"(?:{_pattern.pattern})$")
    _firsts = [*_first, ""] if _name == "null" else list(_first)
    ConfigYamlLoader.add_implicit_resolver(_TAG + _name, _whole, _firsts)


@dataclass
class Tree:
    """Plain values and where each came from.

    Args:
        values: dicts, lists and scalars.
        origins: path from the root -> `file:line`, `override` or `default`.
        findings: what was wrong while reading.
    """

    values: Any = None
    origins: dict[Path, str] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)


def parse(text: str, name: str, has_lines: bool = True) -> Tree:
    """Reads one YAML document.

    Args:
        text: the document.
        name: what findings and origins call it.
        has_lines: origins are `name:line`, not `name` alone.
    """
    if len(text) > MAX_NUM_CHARS:
        found = f"{name}: found {len(text)} characters; allowed: at most {MAX_NUM_CHARS}"
        return Tree(findings=[found])
    try:
        node = yaml.compose(text, Loader=ConfigYamlLoader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark and has_lines else ""
        return Tree(findings=[f"{name}{line}: not valid YAML: {error.problem or error.context}"])
    except (yaml.YAMLError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        return Tree(findings=[f"{name}: not valid YAML: {' '.join(reason.split())}"])
    walk = _Walk(name, has_lines)
    if node is not None:
        walk.tree.values = walk.value(node, (), 0)
    return walk.tree


class _Walk:
    """Turns composed nodes into values; counts them, because an alias repeats its whole node."""

    def __init__(self, name: str, has_lines: bool) -> None:
        self.name, self.has_lines = name, has_lines
        self.tree = Tree()
        self.num_nodes = 0

    def origin(self, node: yaml.Node) -> str:
        return f"{self.name}:{node.start_mark.line + 1}" if self.has_lines else self.name

    def refuse(self, node: yaml.Node, path: Path, message: str) -> None:
        where = f"{self.origin(node)} {'.'.join(path)}".rstrip()
        self.tree.findings.append(f"{where}: {message}")

    def value(self, node: yaml.Node, path: Path, depth: int) -> Any:
        self.num_nodes += 1
        self.tree.origins.setdefault(path, self.origin(node))
        if self.num_nodes > MAX_NUM_NODES or depth > MAX_DEPTH:
            if self.num_nodes <= MAX_NUM_NODES + 1:
                limits = f"{MAX_NUM_NODES} values, {MAX_DEPTH} levels"
                self.refuse(node, path, f"too much, with aliases unfolded; allowed: {limits}")
            self.num_nodes = MAX_NUM_NODES + 1
            return None
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self.mapping(node, path, depth)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            items = enumerate(node.value)
            return [self.value(item, (*path, str(i)), depth + 1) for i, item in items]
        return self.scalar(node, path)

    def mapping(self, node: yaml.MappingNode, path: Path, depth: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.refuse(key_node, path, "found a key that is not text; allowed: a name")
                continue
            key = str(key_node.value)
            inner = (*path, key)
            if key in values:
                first = self.tree.origins[inner]
                self.refuse(key_node, inner, f"found twice; first at {first}")
                continue
            self.tree.origins[inner] = self.origin(key_node)
            values[key] = self.value(value_node, inner, depth + 1)
        return values

    def scalar(self, node: yaml.Node, path: Path) -> Any:
        kind = node.tag.removeprefix(_TAG)
        if not isinstance(node, yaml.ScalarNode) or kind not in _CONSTRUCTORS:
            tag = node.tag.replace(_TAG, "!!")
            self.refuse(node, path, f"found the tag {tag}; allowed: plain values, lists, mappings")
            return None
        try:
            return _CONSTRUCTORS[kind](node.value)
        except (ValueError, KeyError):
            self.refuse(node, path, f"found {node.value[:60]!r}, which is not a value of {kind}")
            return None


_CONSTRUCTORS: dict[str, Any] = {
    "null": lambda text: None,
    "bool": lambda text: {"true": True, "false": False}[text.lower()],
    "int": int,
    "float": lambda text: float(re.sub(r"\.(?=inf|nan)", "", text.lower())),
    "str": str,
}

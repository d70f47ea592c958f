"""PyYAML's safe loader with limits, without its tags for dates, sets and binary data."""

import re
from functools import cache
from typing import Any, ClassVar

from latentgnn.errors import require
from latentgnn.files.plain_values import MOST_DEPTH, too_deep

_MOST_VALUES = 100_000
_MOST_DIGITS = 100

_YAML = "tag:yaml.org,2002:"
# YAML 1.1, which PyYAML reads, treats 1e-4 as a string.
SCIENTIFIC = (f"{_YAML}float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))
"""Numbers in addition to those that PyYAML recognises."""


@cache
def loader() -> Any:
    """Return the loader class."""
    yaml = require("yaml", extra="train")
    safe, refuse = yaml.SafeLoader, yaml.constructor.ConstructorError
    kinds = {"int": "no whole number", "float": "no number", "bool": "neither true nor false"}
    tags = {f"{_YAML}{name}" for name in (*kinds, "null", "str", "seq", "map")}
    merge = f"{_YAML}merge"

    class Loader(safe):  # type: ignore[misc, valid-type]
        yaml_constructors: ClassVar = {tag: safe.yaml_constructors[tag] for tag in tags}
        yaml_implicit_resolvers: ClassVar = {
            first: [(tag, pattern) for tag, pattern in resolvers if tag in tags or tag == merge]
            for first, resolvers in safe.yaml_implicit_resolvers.items()
        }

        def __init__(self, stream: str) -> None:
            super().__init__(stream)
            self.depth = 0
            # For every finished node: its number of values, with aliases expanded, and its depth.
            self.extents: dict[int, tuple[int, int]] = {}

        def compose_node(self, parent: Any, index: Any) -> Any:
            mark, is_alias = self.peek_event().start_mark, self.check_event(yaml.AliasEvent)
            self.depth += 1
            if self.depth > MOST_DEPTH + 1:
                raise refuse(None, None, too_deep(), mark)
            node = super().compose_node(parent, index)
            self.depth -= 1
            if id(node) not in self.extents:
                if is_alias:
                    raise refuse(None, None, "an alias refers to a value that contains it", mark)
                self.extents[id(node)] = self.extent(node)
            values, depth = self.extents[id(node)]
            if values > _MOST_VALUES:
                raise refuse(None, None, f"more than {_MOST_VALUES:,} values, with aliases written out", mark)
            if depth > MOST_DEPTH + 1:
                raise refuse(None, None, too_deep(), mark)
            return node

        def extent(self, node: Any) -> tuple[int, int]:
            children: list[Any] = []
            if isinstance(node, yaml.SequenceNode):
                children = node.value
            elif isinstance(node, yaml.MappingNode):
                children = [child for pair in node.value for child in pair]
            extents = [self.extents[id(child)] for child in children]
            values, depths = zip(*extents, strict=True) if extents else ((0,), (0,))
            return 1 + sum(values), 1 + max(depths)

        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            keys: set[Any] = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise refuse(None, None, "expected a text or a number as key", key.start_mark)
                value = self.construct_object(key) if key.tag != merge else key.value
                if value in keys:
                    raise refuse(None, None, f"{key.value!r} is given twice", key.start_mark)
                keys.add(value)
            return node

    def strictly(construct: Any, kind: str) -> Any:
        def constructor(loader: Any, node: Any) -> Any:
            if len(node.value) > _MOST_DIGITS:
                raise refuse(None, None, f"a number of {len(node.value)} characters", node.start_mark)
            try:
                return construct(loader, node)
            except (ValueError, KeyError, IndexError):
                raise refuse(None, None, f"{node.value!r} is {kind}", node.start_mark) from None

        return constructor

    def strange(loader: Any, node: Any) -> Any:
        raise refuse(None, None, f"the tag {node.tag!r} is not taken; expected plain values", node.start_mark)

    Loader.add_constructor(None, strange)
    for name, kind in kinds.items():
        Loader.add_constructor(f"{_YAML}{name}", strictly(safe.yaml_constructors[f"{_YAML}{name}"], kind))
    Loader.add_implicit_resolver(*SCIENTIFIC)
    return Loader

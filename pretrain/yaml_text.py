"""YAML that nobody vouches for: plain values alone, and no more of them than the text has room for."""

import re
from typing import Any

import yaml

__all__ = ["read_yaml"]

MOST_BYTES = 64 << 20
MOST_VALUES = 1 << 20
"""With each alias counted as all that it stands for: nine lines of aliases can stand for a billion."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-4 as a string; here it is the number that everybody means."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._values: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if node is None:
            return None
        if node not in self._values:
            if alias:
                raise yaml.YAMLError("a value holds itself")
            self._values[node] = 1 + sum(self._values[child] for child in _children(node))
        if self._values[node] > MOST_VALUES:
            raise yaml.YAMLError(f"more than {MOST_VALUES:,} values")
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def read_yaml(text: str) -> Any:
    """
    Raises:
        yaml.YAMLError: not YAML, a tag that asks for an object, or more than a config could be.
    """
    if len(text) > MOST_BYTES:
        raise yaml.YAMLError(f"longer than {MOST_BYTES:,} characters")
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise yaml.YAMLError("nested too deep") from None
    except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError) as error:
        # Of the library, where a tag or a number promises what its text is not.
        raise yaml.YAMLError(f"a value that is not of its kind: {error}") from None


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []

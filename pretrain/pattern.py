"""The layer pattern: which mixer each layer of a hybrid holds.

The letters are Megatron-LM's: ``M`` Mamba-2, ``*`` attention, ``-`` MLP, ``E`` mixture of experts.
``[...]xN`` repeats what stands in the brackets N times, and nests. It is plait's own notation, so
every border (export, import) speaks the expanded form that :func:`expand` returns.
"""

import re

__all__ = ["LETTERS", "expand"]

LETTERS = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
"""Letter -> the section of ``model`` that shapes its layers."""

MAX_LAYERS = 4096

_REPEAT = re.compile(r"\[([^\[\]]*)\](?:x(\d+))?")


def expand(pattern: str) -> str:
    """Write a pattern with brackets as one letter a layer.

    >>> expand("M*[ME]x2")
    'M*MEME'

    Raises:
        ValueError: an unknown letter, a bracket without its partner or without ``xN``, a pattern
            without a layer, or one of more than 4096 layers.
    """
    text = "".join(pattern.split())
    while match := _REPEAT.search(text):
        body, count = match.groups()
        if count is None:
            raise ValueError(f"'[{body}]' has no count; write '[{body}]xN'")
        if not body or int(count) == 0:
            raise ValueError(f"'[{body}]x{count}' holds no layer; leave it out")
        if len(count) > 4 or len(body) * int(count) > MAX_LAYERS:
            raise ValueError(f"'[{body}]x{count}' makes more than {MAX_LAYERS} layers")
        text = text[: match.start()] + body * int(count) + text[match.end() :]
    for position, letter in enumerate(text):
        if letter in "[]":
            raise ValueError(f"the bracket '{letter}' has no partner")
        if letter not in LETTERS:
            raise ValueError(
                f"letter '{letter}' at layer {position} is unknown; use "
                "M (Mamba-2), * (attention), - (MLP), E (experts)"
            )
    if not text:
        raise ValueError("the pattern is empty; a model needs a layer")
    if len(text) > MAX_LAYERS:
        raise ValueError(f"the pattern has {len(text)} layers, more than {MAX_LAYERS}")
    return text

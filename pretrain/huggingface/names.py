"""Which of plait's tensors make which tensor of a nemotron_h folder: one table for both directions.

A tensor on disk is one of plait's, several of them concatenated along dim 0, or one expert of a stack.
The table is data: export joins by it, import splits by it, and both keep every bit.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import UserError
from ..config import ModelConfig
from ..model import Hybrid

__all__ = ["FileTensor", "Part", "from_files", "join", "split", "tensor_map"]

BEFORE_LAYERS = {"backbone.embeddings.weight": ("embedding.weight",)}
AFTER_LAYERS = {"backbone.norm_f.weight": ("final_norm.weight",), "lm_head.weight": ("head.weight",)}
TIED_AFTER_LAYERS = {**AFTER_LAYERS, "lm_head.weight": ("embedding.weight",)}
LAYER_NORM = {"norm.weight": ("norm.weight",)}

MIXERS: dict[str, dict[str, tuple[str, ...]]] = {
    "M": {
        "in_proj.weight": (
            "z_proj.weight",
            "x_proj.weight",
            "b_proj.weight",
            "c_proj.weight",
            "dt_proj.weight",
        ),
        "conv1d.weight": ("x_conv.weight", "b_conv.weight", "c_conv.weight"),
        "conv1d.bias": ("x_conv.bias", "b_conv.bias", "c_conv.bias"),
        "dt_bias": ("dt_bias",),
        "A_log": ("A_log",),
        "D": ("D",),
        "norm.weight": ("norm.weight",),
        "out_proj.weight": ("out_proj.weight",),
    },
    "*": {name: (name,) for name in ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")},
    "-": {name: (name,) for name in ("up_proj.weight", "down_proj.weight")},
    "E": {
        "gate.weight": ("router.weight",),
        "gate.e_score_correction_bias": ("router.correction_bias",),
        "fc1_latent_proj.weight": ("latent_in_proj.weight",),
        "fc2_latent_proj.weight": ("latent_out_proj.weight",),
        "experts.{}.up_proj.weight": ("experts.up_proj",),
        "experts.{}.down_proj.weight": ("experts.down_proj",),
        "shared_experts.up_proj.weight": ("shared.up_proj.weight",),
        "shared_experts.down_proj.weight": ("shared.down_proj.weight",),
    },
}
"""Letter -> name on disk -> plait's names, in the order in which they are concatenated. ``{}`` stands
for an expert: the tensor on disk is one slice of plait's stack."""


@dataclass(frozen=True)
class Part:
    """What one of plait's tensors gives to a tensor on disk."""

    name: str
    """In the state dict of :class:`plait.pretrain.model.Hybrid`."""
    full_shape: tuple[int, ...]
    """Of plait's tensor, as a whole."""
    expert: int | None = None
    """The slice of a stack of experts; None is the whole tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.full_shape if self.expert is None else self.full_shape[1:]


@dataclass(frozen=True)
class FileTensor:
    """A tensor on disk: its parts one below the other along dim 0."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]


def tensor_map(config: ModelConfig) -> list[FileTensor]:
    """Every tensor of the model's nemotron_h folder, in the order of the layers.

    With tied embeddings the one matrix is written under both names, since nemotron_h ties nothing.

    Raises:
        ValueError: the model has a tensor that nemotron_h has no place for.
    """
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in Hybrid(config).state_dict().items()}
    entries = _entries("", BEFORE_LAYERS, "", shapes)
    for index, letter in enumerate(config.layers):
        ours, theirs = f"layers.{index}.", f"backbone.layers.{index}."
        entries += _entries(theirs, LAYER_NORM, ours, shapes)
        entries += _entries(theirs + "mixer.", MIXERS[letter], ours + "mixer.", shapes)
    entries += _entries("", TIED_AFTER_LAYERS if config.tie_embeddings else AFTER_LAYERS, "", shapes)
    if homeless := shapes.keys() - {part.name for entry in entries for part in entry.parts}:
        raise ValueError(f"nemotron_h has no place for {', '.join(sorted(homeless))}")
    return entries


def _entries(
    theirs: str, table: Mapping[str, tuple[str, ...]], ours: str, shapes: Mapping[str, tuple[int, ...]]
) -> list[FileTensor]:
    entries = []
    for name, sources in table.items():
        names = tuple(ours + source for source in sources)
        if names[0] not in shapes:
            continue
        if "{}" not in name:
            entries.append(_whole(theirs + name, names, shapes))
            continue
        shape = shapes[names[0]]
        entries += [
            FileTensor(theirs + name.format(expert), shape[1:], (Part(names[0], shape, expert),))
            for expert in range(shape[0])
        ]
    return entries


def _whole(name: str, sources: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> FileTensor:
    parts = tuple(Part(source, shapes[source]) for source in sources)
    rows, rest = sum(part.shape[0] for part in parts), parts[0].shape[1:]
    # torch's depthwise convolution has a dim for the one input channel of each output channel.
    rest = (1, *rest) if name.endswith("conv1d.weight") else rest
    return FileTensor(name, (rows, *rest), parts)


def join(entry: FileTensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """A tensor on disk from plait's, contiguous; one that is plait's own may share its memory."""
    pieces = [
        tensors[part.name] if part.expert is None else tensors[part.name][part.expert] for part in entry.parts
    ]
    joined = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return joined.reshape(entry.shape).contiguous()


def split(entry: FileTensor, tensor: Tensor) -> list[tuple[Part, Tensor]]:
    """Its parts in a tensor on disk, each in plait's shape: views, the inverse of :func:`join`.

    Raises:
        UserError: the tensor has another shape.
    """
    if tuple(tensor.shape) != entry.shape:
        raise UserError(
            f"{entry.name} has the shape {tuple(tensor.shape)} and this model wants {entry.shape}; "
            "bring the config.json that belongs to these tensors"
        )
    rows = [entry.shape[0]] if len(entry.parts) == 1 else [part.shape[0] for part in entry.parts]
    pieces = tensor.split(rows)
    return [(part, piece.reshape(part.shape)) for part, piece in zip(entry.parts, pieces, strict=True)]


def from_files(entries: Sequence[FileTensor], read: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Plait's state dict from the tensors on disk, bit for bit.

    Args:
        read: gives a tensor on disk by its name.

    Raises:
        UserError: a tensor of another shape, or two that plait holds as one and that differ.
    """
    tensors: dict[str, Tensor] = {}
    for entry in entries:
        for part, piece in split(entry, read(entry.name)):
            if part.expert is not None:
                if part.name not in tensors:
                    tensors[part.name] = piece.new_empty(part.full_shape)
                tensors[part.name][part.expert] = piece
            elif part.name not in tensors:
                tensors[part.name] = piece.clone()
            elif not torch.equal(tensors[part.name], piece):
                raise UserError(
                    f"{entry.name} differs from backbone.embeddings.weight, and model.tie_embeddings = true "
                    "holds them as one; set model.tie_embeddings = false"
                )
    return tensors

"""How parameters begin, and what was allocated on the way."""

from typing import Any

from torch import Tensor
from torch._subclasses import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from plait.parallel.placements import local, part
from plait.pretrain.config_file import parse_config
from plait.pretrain.trainer import Trainer


class _Allocations(TorchDispatchMode):
    """The tensors that operators gave while the mode was on, those on the meta device left out."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            # It has the whole's shape and not its memory: see what it does to its local part.
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and not isinstance(tensor, FakeTensor) and not tensor.is_meta:
                self.shapes.add(tuple(tensor.shape))
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return out


def run(tree: dict[str, Any]) -> dict[str, Any]:
    """This rank's part of every parameter, each one's whole shape, and what making the run allocated."""
    with _Allocations() as allocations:
        trainer = Trainer(parse_config(tree, "test"))
    parameters = dict(trainer.state.model.named_parameters())
    return {
        "parts": {name: (part(p), local(p).detach().clone()) for name, p in parameters.items()},
        "shapes": {name: tuple(p.shape) for name, p in parameters.items()},
        "allocated": allocations.shapes,
        "largest": allocations.largest,
    }

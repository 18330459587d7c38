"""The dtypes that a step in bf16 has, read where it happens."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from plait.parallel import fsdp
from plait.parallel.placements import local
from plait.pretrain.config_file import parse_config
from plait.pretrain.trainer import Trainer


class _Products(TorchFunctionMode):
    """By the shape of its weight, the dtypes that `linear` multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[tuple[int, ...], set[torch.dtype]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            weight: Tensor = args[1]
            self.found.setdefault(tuple(weight.shape), set()).update({args[0].dtype, weight.dtype})
        return func(*args, **(kwargs or {}))


def run(tree: dict[str, Any]) -> dict[str, Any]:
    """Dtypes by parameter (stored, gathered, gradient, moments), by product, and of what was reduced."""
    trainer = Trainer(parse_config(tree, "test"))
    model, optimizer = trainer.state.model, trainer.state.optimizer
    gathered: dict[str, torch.dtype] = {}
    shapes: dict[str, tuple[int, ...]] = {}

    def note(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, *_: Any) -> None:
            # The innermost module that is called before a parameter is used comes last.
            for name, parameter in module.named_parameters():
                whole = local(parameter)
                full_name = f"{path}.{name}" if path else name
                gathered[full_name], shapes[full_name] = whole.dtype, tuple(whole.shape)

        return hook

    hooks = [module.register_forward_pre_hook(note(path)) for path, module in model.named_modules()]
    reduced: set[torch.dtype] = set()
    scatter = fsdp.scatter_into

    def recorded(output: Tensor, shards: Tensor, **options: Any) -> Any:
        reduced.update({output.dtype, shards.dtype})
        return scatter(output, shards, **options)

    fsdp.scatter_into = recorded
    gradients: dict[str, torch.dtype] = {}
    step = optimizer.step

    def stepped(closure: Any = None) -> Any:
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            gradients[name] = local(parameter.grad).dtype
        return step(closure)

    optimizer.step = stepped
    products = _Products()
    try:
        with trainer._loader() as loader, products:
            trainer.train_step(loader.next()[0])
    finally:
        fsdp.scatter_into = scatter
        for hook in hooks:
            hook.remove()
    parameters = dict(model.named_parameters())
    return {
        "stored": {name: local(p).dtype for name, p in parameters.items()},
        "gathered": gathered,
        "shapes": shapes,
        "gradient": gradients,
        "moments": {
            name: {local(optimizer.state[p][kind]).dtype for kind in ("exp_avg", "exp_avg_sq")}
            for name, p in parameters.items()
        },
        "products": products.found,
        "reduced": reduced,
    }

"""transformers loads what was written, and computes what plait computes.

Shapes: B windows, L tokens, T = B L, V vocabulary, E experts, G groups of e experts, K experts a token.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...data.tokenizer import Tokenizer
from ...errors import UserError
from ..model import Hybrid, Packing
from .names import FileTensor

__all__ = ["Agreement", "ExportError", "Outputs", "check_model", "check_tokenizer", "compute"]

TOLERANCE = 1e-4
"""Of logits, relative to the largest: both sides compute in fp32, in another order."""

TIE = 1e-4
"""Two experts' scores so close may change places by rounding, and so may two groups'."""


class ExportError(UserError):
    """What was written does not come back as what it was; nothing of it stays."""


@dataclass(frozen=True)
class Outputs:
    """What a model makes of some windows."""

    logits_BLV: Tensor
    experts_BLK: list[Tensor]
    """The choice of each E layer, in order."""


@dataclass(frozen=True)
class Agreement:
    logit_error: float
    """The largest difference of two logits, relative to the largest logit."""
    positions: int
    """How many were compared: all up to the first whose experts a rounding decided."""


@torch.no_grad()
def compute(model: Hybrid, tokens_BL: Tensor) -> Outputs:
    """Plait's own outputs, each window as one document."""
    chosen: list[Tensor] = []
    batch = tokens_BL.shape[0]
    hooks = [
        router.register_forward_hook(
            lambda _, __, choice: chosen.append(choice.expert_TK.unflatten(0, (batch, -1)))
        )
        for router in model.routers
    ]
    positions = torch.arange(tokens_BL.shape[1]).expand_as(tokens_BL)
    hidden, _ = model(tokens_BL, Packing(positions, None))
    for hook in hooks:
        hook.remove()
    return Outputs(model.logits(hidden), chosen)


@torch.no_grad()
def check_model(
    folder: Path, entries: list[FileTensor], tokens_BL: Tensor, expected: Outputs, *, carried: bool = False
) -> Agreement:
    """Load the folder with transformers, in fp32 on the CPU, and compare.

    Args:
        entries: what is in the files.
        carried: whether the files hold tensors besides, which transformers has no use for.
        tokens_BL: int64.
        expected: plait's outputs for them, of the weights as written.

    Raises:
        ExportError: a tensor is missing, unknown or of another shape, or a logit differs by more than
            1e-4 of the largest.
    """
    if not expected.logits_BLV.isfinite().all():
        raise ExportError(
            "the model's logits are not finite, so there is nothing to compare; export an earlier step"
        )
    with _quiet_transformers() as transformers, _torch_functions():
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            # Its grouped products take no odd widths on the CPU.
            experts_implementation="eager",
        )
        _check_inventory(model, info, entries, carried)
        model.eval()
        routed: list[tuple[Tensor, Tensor]] = []
        for name, module in model.named_modules():
            if name.endswith("mixer.gate"):
                module.register_forward_hook(lambda gate, _, out: routed.append(_routing(gate, out)))
        logits_BLV = model(tokens_BL, use_cache=False).logits
    same_BL = torch.ones_like(tokens_BL, dtype=torch.bool)
    for ours_BLK, (theirs_TK, gap_T) in zip(expected.experts_BLK, routed, strict=True):
        theirs_BLK = theirs_TK.view_as(ours_BLK)
        same_BL &= _same_until_tie(ours_BLK, theirs_BLK, gap_T.view_as(tokens_BL), same_BL)
    difference = (logits_BLV - expected.logits_BLV)[same_BL].abs()
    if not difference.numel():
        raise ExportError("every window begins with a tie of two experts; export another step")
    error = float(difference.max() / expected.logits_BLV.abs().max())
    if not error <= TOLERANCE:
        raise ExportError(
            f"transformers {transformers.__version__} computes other logits than plait, by {error:.1e} of "
            f"the largest, where {TOLERANCE} is rounding; nothing was exported, please report this"
        )
    return Agreement(error, int(same_BL.sum()))


def _check_inventory(model: Any, info: dict[str, Any], entries: list[FileTensor], carried: bool) -> None:
    for kind, found in info.items():
        # An entry among them would be missing from the model, which is the next kind.
        if found and not (carried and kind == "unexpected_keys"):
            raise ExportError(
                f"transformers reads the files with {kind} = {sorted(map(str, found))[:3]}; "
                "nothing was exported, please report this"
            )
    written = sum(torch.Size(entry.shape).numel() for entry in entries)
    held = sum(tensor.numel() for tensor in model.state_dict().values())
    if written != held:
        raise ExportError(
            f"the files hold {written} numbers and transformers' model {held}; "
            "nothing was exported, please report this"
        )


def _routing(gate: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A gate's choice, and how close it was (T,)."""
    logits_TE, _, experts_TK = output
    merit_TE = logits_TE.sigmoid() + gate.e_score_correction_bias
    return experts_TK, _gap(merit_TE, experts_TK.shape[-1], gate.num_group, gate.topk_group)


def _gap(merit_TE: Tensor, k: int, num_groups: int, top_k_groups: int) -> Tensor:
    """How far the last that was chosen is above the first that was not, of groups or of experts (T,)."""
    gap_T = merit_TE.new_full(merit_TE.shape[:1], torch.inf)
    if top_k_groups < num_groups:
        merit_TGe = merit_TE.unflatten(-1, (num_groups, -1))
        best = merit_TGe.topk(2, dim=-1).values.sum(-1).topk(top_k_groups + 1, dim=-1)
        gap_T = best.values[:, -2] - best.values[:, -1]
        chosen = best.indices[:, :-1, None].expand(-1, -1, merit_TGe.shape[-1])
        merit_TE = merit_TGe.gather(1, chosen).flatten(1)
    if k < merit_TE.shape[-1]:
        best = merit_TE.topk(k + 1, dim=-1)
        gap_T = gap_T.minimum(best.values[:, -2] - best.values[:, -1])
    return gap_T


def _same_until_tie(ours_BLK: Tensor, theirs_BLK: Tensor, gap_BL: Tensor, so_far_BL: Tensor) -> Tensor:
    """Which positions come before the first that a rounding sent to another expert.

    A token in another expert is another token for all that follow it in the window.

    Args:
        gap_BL: how close each choice was.

    Raises:
        ExportError: another choice where none was close.
    """
    equal = (ours_BLK.sort(-1).values == theirs_BLK.sort(-1).values).all(-1)
    flipped_BL = ~equal & so_far_BL
    if not flipped_BL.any():
        return so_far_BL
    if (gap_BL[flipped_BL] > TIE).any():
        raise ExportError(
            "transformers sends tokens to other experts than plait; nothing was exported, please report this"
        )
    return flipped_BL.cumsum(1) == 0


def check_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Load the folder's tokenizer with transformers and compare it with the run's on hard texts.

    Raises:
        ExportError: other ids, or, of a sentencepiece model, another text from them.
    """
    with _quiet_transformers() as transformers:
        theirs = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        # What comes as tokenizer.json may add tokens to a text, and read names of special ones in it.
        options = (
            {"add_special_tokens": False, "split_special_tokens": True}
            if tokenizer.kind == "huggingface"
            else {}
        )
        for text in _hard_texts():
            ids = tokenizer.encode(text)
            if theirs(text, **options)["input_ids"] != ids:
                raise ExportError(
                    f"transformers {transformers.__version__} gives other ids than {tokenizer.path} for a "
                    f"text that begins with {text[:20]!r}; nothing was exported, please report this"
                )
            if tokenizer.kind == "sentencepiece" and theirs.decode(ids) != tokenizer.decode(ids):
                raise ExportError(
                    f"transformers {transformers.__version__} decodes another text than sentencepiece where "
                    f"it begins with {text[:20]!r}; nothing was exported, please report this"
                )


def _hard_texts() -> list[str]:
    characters = "".join(chr(c) for c in range(0, 0x110000, 61) if not 0xD800 <= c < 0xE000)
    garbage = bytes(i * 151 % 256 for i in range(4096)).decode("utf-8", "replace")
    whitespace = "".join(" " * n + "\n" * (n % 4) + "\t" * (n % 3) for n in range(70))
    specials = "<|endofdocument|><unk> <0x41><s></s>▁▁ a<|endofdocument|>"
    code = Path(__file__).read_text(encoding="utf-8")
    return ["", " ", "\n", characters, garbage, whitespace, specials, code, "\ufeffe\u0301é\r\n\x00"]


@contextmanager
def _quiet_transformers() -> Iterator[Any]:
    """transformers without progress bars and log lines; its settings are put back after."""
    import transformers
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield transformers
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _torch_functions() -> Iterator[None]:
    """transformers' own torch functions in the place of CUDA kernels.

    Where the packages mamba-ssm and causal-conv1d are installed it calls them, which take no tensors
    on the CPU; the functions that they stand for are kept as `__wrapped__`.
    """
    from transformers.models.nemotron_h import modeling_nemotron_h as modeling

    found = {
        name: function
        for name, function in vars(modeling).items()
        if name.startswith(("mamba2_", "causal_conv1d_")) and hasattr(function, "__wrapped__")
    }
    for name, function in found.items():
        setattr(modeling, name, function.__wrapped__)
    try:
        yield
    finally:
        for name, function in found.items():
            setattr(modeling, name, function)

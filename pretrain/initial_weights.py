"""Where a new run's weights come from, when not from its seed: another run's checkpoint, or an import's."""

import logging
from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from .checkpoint import Checkpoint
from .config import Config, ModelConfig
from .config_file import parse_model
from .growing_vocabulary import ROWS_OF_VOCABULARY
from .loading import empty_on_meta
from .named_checkpoints import find_intact
from .pattern import LETTERS
from .run_folder import RunFolder
from .saved_facts import check_origin, config_tree
from .train_state import CARRIED, TrainState, empty_carried, word_differences

__all__ = ["InitialWeights", "find_initial_weights", "model_of"]

logger = logging.getLogger(__name__)

FREE = {
    "mamba": ("chunk_size",),
    "moe": ("score_bias", "score_bias_rate", "aux_loss", "z_loss"),
}
"""Section of the model -> keys that change how it is trained, not what it computes."""


@dataclass(frozen=True)
class InitialWeights:
    """What `checkpoint.init_from` names."""

    name: str
    """As the config says it."""
    folder: RunFolder
    checkpoint: Checkpoint
    grows: bool = False
    """Whether `checkpoint.grow_vocabulary` lets the model have more rows than were saved."""

    def __str__(self) -> str:
        return f"step {self.checkpoint.step} of {self.folder.path}"

    def check_model(self, model: ModelConfig) -> None:
        """
        Raises:
            UserError: the weights are those of another model; names the keys.
        """
        there, here = _keys(model_of(self.checkpoint)), _keys(model)
        # Layers that only one of them has are told apart by their patterns.
        shared = sorted(there.keys() & here.keys())
        differ = {key: (there[key], here[key]) for key in shared if there[key] != here[key]}
        more = there["model.vocab_size"] < here["model.vocab_size"]
        if self.grows and more:
            del differ["model.vocab_size"]
        if differ:
            grow = "; checkpoint.grow_vocabulary = true lets model.vocab_size be larger here"
            raise UserError(
                f"checkpoint.init_from = {self.name}: the weights of another model: "
                f"{word_differences(differ, 'there', 'here')}; leave those keys out of the config, or begin "
                f"from another run{grow if more and not self.grows else ''}"
            )

    def load_into(self, state: TrainState) -> None:
        """Give a new run's state the weights, the routers' biases, what is only carried, and the origin."""
        weights = {name: t for name, t in state.tensors().items() if name.startswith("model.")}
        state.carried = empty_carried(self.checkpoint)
        carried = {CARRIED + name: tensor for name, tensor in state.carried.items()}
        # The dtype they were saved in need not be that of this run's parameters.
        growing = ROWS_OF_VOCABULARY if self.grows else ()
        self.checkpoint.convert_into(weights | carried, growing=growing)
        state.origin = _origin(self)
        logger.info("begun with the weights of %s", self)


def find_initial_weights(config: Config) -> InitialWeights | None:
    """What `checkpoint.init_from` names; None where it is not set.

    Raises:
        UserError: no such run, no such step, a damaged one, or another model than the config's.
    """
    name = config.checkpoint.init_from
    if name is None:
        return None
    try:
        folder, checkpoint = find_intact(name, logger.warning)
    except UserError as error:
        raise UserError(f"checkpoint.init_from = {name}: {error}") from None
    initial = InitialWeights(name, folder, checkpoint, grows=config.checkpoint.grow_vocabulary)
    empty_on_meta(model_of(checkpoint), checkpoint)
    initial.check_model(config.model)
    return initial


def model_of(checkpoint: Checkpoint) -> ModelConfig:
    """The model whose weights a checkpoint holds, that of a training or of an import.

    Raises:
        UserError: the checkpoint does not describe one.
    """
    check_origin(checkpoint)
    return parse_model(config_tree(checkpoint), str(checkpoint.path))


def _origin(initial: InitialWeights) -> dict[str, Any]:
    origin = dict(initial.checkpoint.manifest.facts.get("origin", {}))
    if "huggingface" in origin:
        # The dtypes of single tensors end here: see `huggingface/origin.py`.
        origin["huggingface"] = origin["huggingface"] | {"dtypes": {}}
    return origin | {"run": initial.name, "step": initial.checkpoint.step}


def _keys(model: ModelConfig) -> dict[str, Any]:
    """What decides the weights' meaning: key -> value; sections of layers that the model lacks left out."""
    tree = model.model_dump(mode="json")
    keys = {f"model.{key}": value for key, value in tree.items() if key not in LETTERS.values()}
    keys["model.pattern"] = model.layers
    for letter in sorted(set(model.layers)):
        section = LETTERS[letter]
        free = FREE.get(section, ())
        keys |= {f"model.{section}.{key}": v for key, v in tree[section].items() if key not in free}
    return keys

"""What the training loop calls: at the start, after each step, at the end."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..trainer import Trainer

__all__ = ["Callback"]


class Callback:
    """Does nothing; a callback overrides what it wants to hear of."""

    def start(self, trainer: "Trainer") -> None:
        """The run begins or goes on; `trainer.state.step` steps are done."""

    def step(self, trainer: "Trainer", metrics: dict[str, Any]) -> None:
        """A step is done. What is added to `metrics` reaches the callbacks after this one."""

    def stage(self, trainer: "Trainer", changes: dict[str, tuple[Any, Any]]) -> None:
        """A stage of the config begins with the next step; `changes` are key -> (before, from now on)."""

    def end(self, trainer: "Trainer") -> None:
        """The run leaves the loop, by its last step or by an exception (`trainer.failed`).

        After an exception this rank is alone with it: what needs the other ranks must be left undone.
        """

"""Signs of progress for the watchdog of this rank."""

from typing import TYPE_CHECKING, Any

from ...parallel.pace import Pace
from ...parallel.watchdog import Watchdog
from .base import Callback

if TYPE_CHECKING:
    from ..trainer import Trainer

__all__ = ["Heartbeat"]


class Heartbeat(Callback):
    """Tells the watchdog of the run's start, its steps and its end.

    Given to the trainer twice, before and after the callbacks that take long, it tells of those too.

    Args:
        pace: of the steps; what follows the last callbacks of a step is held to it.
        after: what is done when a step reaches this callback, such as "" or "callbacks of ".
    """

    def __init__(self, watchdog: Watchdog, pace: Pace, after: str = "") -> None:
        self.watchdog, self.pace, self.after = watchdog, pace, after

    def start(self, trainer: "Trainer") -> None:
        self.watchdog.beat(f"{self.after}the run's start at step {trainer.state.step}")

    def step(self, trainer: "Trainer", metrics: dict[str, Any]) -> None:
        if not self.after:
            self.pace.took(metrics["step_seconds"])
        ended = metrics["step"] == trainer.last_step
        limit = self.pace.limit() if self.after and not ended else None
        self.watchdog.beat(f"{self.after}step {metrics['step']}", limit)

    def stage(self, trainer: "Trainer", changes: dict[str, tuple[Any, Any]]) -> None:
        self.pace.forget()
        self.watchdog.beat(f"{self.after}the stage after step {trainer.state.step}")

    def end(self, trainer: "Trainer") -> None:
        self.watchdog.beat(f"{self.after}the run's end at step {trainer.state.step}")

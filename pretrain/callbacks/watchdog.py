"""Signs of progress for the watchdog of this rank."""

from typing import TYPE_CHECKING, Any

from ...parallel.watchdog import Watchdog
from .base import Callback

if TYPE_CHECKING:
    from ..trainer import Trainer

__all__ = ["Heartbeat"]


class Heartbeat(Callback):
    """Tells the watchdog of the run's start, its steps and its end.

    Given to the trainer twice, before and after the callbacks that take long, it tells of those too.

    Args:
        after: what is done when a step reaches this callback, such as "" or "callbacks of ".
    """

    def __init__(self, watchdog: Watchdog, after: str = "") -> None:
        self.watchdog, self.after = watchdog, after

    def start(self, trainer: "Trainer") -> None:
        self.watchdog.beat(f"{self.after}the run's start at step {trainer.state.step}")

    def step(self, trainer: "Trainer", metrics: dict[str, Any]) -> None:
        self.watchdog.beat(f"{self.after}step {metrics['step']}")

    def end(self, trainer: "Trainer") -> None:
        self.watchdog.beat(f"{self.after}the run's end at step {trainer.state.step}")

"""What a person sees while a run goes on: one live line on a terminal, plain lines elsewhere."""

from collections import deque
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from ...parallel.axes import describe_layout
from ...parallel.mesh import Mesh
from ...parallel.state_passing import choose_exchange
from ..readable import readable_count, readable_time
from .base import Callback

if TYPE_CHECKING:
    from ..trainer import Trainer

__all__ = ["Progress"]

RECENT_STEPS = 20
"""Steps whose median time the time left is reckoned with."""


class Progress(Callback):
    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self._live: Live | None = None
        self._seconds: deque[float] = deque(maxlen=RECENT_STEPS)

    def start(self, trainer: "Trainer") -> None:
        config, present, state = trainer.config, trainer.present, trainer.state
        parameters = sum(p.numel() for p in state.model.parameters())
        name = config.model.pattern
        self.console.print(
            f"[bold]{trainer.folder.path}[/]  {name}, {readable_count(parameters)} parameters, "
            f"{config.train.dtype} on {trainer.device.type}, "
            f"{present.train.batch_size} x {present.data.seq_len} tokens a step",
            soft_wrap=True,
        )
        if trainer.mesh.world_size > 1:
            self.console.print(_layout(trainer.mesh), soft_wrap=True)
        if trainer.resumed_from is not None:
            self.console.print(
                f"[green]resumed[/] from the checkpoint of step {trainer.resumed_from} "
                f"({readable_count(state.samples)} sequences read)",
                soft_wrap=True,
            )
        if trainer.begun_from is not None:
            self.console.print(f"[green]begun[/] with the weights of {trainer.begun_from}", soft_wrap=True)
        if self.console.is_terminal:
            self._live = Live(console=self.console, refresh_per_second=8, transient=True)
            self._live.start()

    def step(self, trainer: "Trainer", metrics: dict[str, Any]) -> None:
        self._seconds.append(metrics["step_seconds"])
        step, last = metrics["step"], metrics["step"] == trainer.last_step
        left = (trainer.last_step - step) * median(self._seconds)
        line = _line(metrics, trainer.config.train.steps, left)
        if self._live is not None:
            self._live.update(line)
        if last or "validation_loss" in metrics or step % trainer.config.log.every == 0:
            self.console.print(line, soft_wrap=True)

    def stage(self, trainer: "Trainer", changes: dict[str, tuple[Any, Any]]) -> None:
        self._seconds.clear()
        shown = ", ".join(f"{key} {before} -> {now}" for key, (before, now) in changes.items())
        number, count = trainer.stage, len(trainer.config.stages)
        self.console.print(
            f"[cyan]stage {number} of {count}[/] after step {trainer.state.step}: {escape(shown)}",
            soft_wrap=True,
        )

    def end(self, trainer: "Trainer") -> None:
        if self._live is not None:
            self._live.stop()


def _line(metrics: dict[str, Any], steps: int, left: float) -> Text:
    parts = [
        (f"step {metrics['step']:>{len(str(steps))}}/{steps}", "bold"),
        (f"loss {metrics['loss']:.4f}", "cyan"),
        (f"grad {metrics['grad_norm']:.3f}", ""),
        (f"lr {metrics['lr']:.1e}", "dim"),
        (f"{readable_count(metrics['tokens_per_second'])} tok/s", ""),
        (f"MFU {metrics['mfu']:.0%}", "dim"),
        (f"{readable_time(left)} left", "dim"),
    ]
    if "validation_loss" in metrics:
        parts.append((f"validation {metrics['validation_loss']:.4f}", "bold green"))
    return Text("  ", no_wrap=True, overflow="ellipsis").join(Text(*part) for part in parts)


def _layout(mesh: Mesh) -> str:
    """The ranks and what travels between them, in a line."""
    line = f"[cyan]{mesh.world_size} ranks[/]: {describe_layout(mesh.sizes)}"
    if mesh.sp.size > 1:
        kind = choose_exchange(mesh.state_exchange, mesh.sp.size)
        line += f"; a sequence lies on {mesh.sp.size} of them, and SSM states pass along it by {kind}"
    return line

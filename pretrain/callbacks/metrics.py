"""The run's record: a line of JSON a step, and TensorBoard."""

import json
import logging
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...data.tokenizer import Tokenizer
from ..config_file import dump_config
from ..expert_load import draw_loads
from ..generation import collect, decode
from ..lasting_file import LastingFile
from ..layer_metrics import layers_of
from ..metrics_file import walk_back
from .base import Callback

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

    from ..trainer import Trainer

__all__ = ["MetricsFile", "TensorBoard"]

logger = logging.getLogger(__name__)

TAGS = {
    "loss": "loss/training",
    "validation_loss": "loss/validation",
    "grad_norm": "optimizer/grad_norm",
    "lr": "optimizer/lr",
    "tokens": "optimizer/tokens",
    "samples": "optimizer/samples",
    "tokens_per_second": "speed/tokens_per_second",
    "step_seconds": "speed/step_seconds",
    "data_seconds": "speed/data_seconds",
    "mfu": "speed/mfu",
    "slowest_rank": "speed/slowest_rank",
    "slowest_share": "speed/slowest_share",
}
"""Where TensorBoard shows a metric; the rest are parts of the loss."""

PROMPT = "def "
SAMPLE_TOKENS = 48
PROBE_BYTES = 1 << 16


class MetricsFile(Callback):
    """Appends each step's metrics to metrics.jsonl, floats in full precision; while the run's folder is away
    they wait."""

    _file: LastingFile | None = None

    def start(self, trainer: "Trainer") -> None:
        path = trainer.folder.metrics_file
        again = _taken_up_at(trainer.state.step, path)
        self._file = LastingFile(path, trainer.folder.absence)
        for line in again:
            self._file.append(line)

    def step(self, trainer: "Trainer", metrics: dict[str, Any]) -> None:
        assert self._file is not None
        self._file.append(json.dumps(metrics))

    def end(self, trainer: "Trainer") -> None:
        if self._file is not None:
            self._file.close()


def _taken_up_at(step: int, path: Path) -> list[str]:
    """The line of this step once more, where a life that died has some beyond it, which that supersedes."""
    try:
        for count, (other, line) in enumerate(walk_back(path, path.stat().st_size)):
            if other <= step:
                return [line.decode()] if other == step and count else []
    except OSError:
        pass
    return []


class TensorBoard(Callback):
    """Scalars at the log's interval, the config once; where the run is evaluated, the experts' loads as a
    picture and a generated text. What the disk refuses is left out."""

    _writer: "SummaryWriter | None" = None
    _told = False
    _refused: OSError | None = None

    def start(self, trainer: "Trainer") -> None:
        self._writer = self._open(trainer)

    def step(self, trainer: "Trainer", metrics: dict[str, Any]) -> None:
        try:
            if self._writer is None or not trainer.folder.tensorboard.is_dir():
                if (absence := trainer.folder.absence()) is not None:
                    raise OSError(absence)
                self._close()
                self._writer = self._open(trainer)
            written = self._write(self._writer, trainer, metrics)
            if self._refused is not None:
                raise self._refused
            self._told = self._told and not written
        except OSError as error:
            self._close()
            if not self._told:
                logger.warning("%s: cannot be written: %s; tried again", trainer.folder.tensorboard, error)
            self._told = True

    def _open(self, trainer: "Trainer") -> "SummaryWriter":
        from torch.utils.tensorboard.writer import SummaryWriter

        # The writer's own thread would be the first to hear that nothing can be written.
        probe = trainer.folder.tensorboard / ".probe"
        probe.parent.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(bytes(PROBE_BYTES))
        finally:
            probe.unlink(missing_ok=True)
        # What lies beyond the step taken up again is of a life that ended; it would be drawn twice.
        writer = SummaryWriter(str(trainer.folder.tensorboard), purge_step=trainer.state.step + 1)
        self._refused = None
        # Its thread writes; what the disk refuses there would end the thread with a traceback.
        record: Any = writer.file_writer.event_writer._async_writer._writer  # pyright: ignore
        for name in ("write", "flush", "close"):
            setattr(record, name, partial(self._attempt, getattr(record, name)))
        writer.add_text("config", f"```yaml\n{dump_config(trainer.config)}\n```", trainer.state.step)
        return writer

    def _attempt(self, write: Callable[..., None], *args: Any) -> None:
        try:
            write(*args)
        except OSError as error:
            self._refused = error

    def _write(self, writer: "SummaryWriter", trainer: "Trainer", metrics: dict[str, Any]) -> bool:
        """Whether the step is one of those that are written."""
        step = metrics["step"]
        evaluated = "validation_loss" in metrics
        due = evaluated or step % trainer.config.log.every == 0
        if due:
            for name, value in metrics.items():
                if isinstance(value, list):
                    layers = layers_of(name, trainer.config.model)
                    for layer, one in zip(layers, value, strict=True):
                        writer.add_scalar(f"{name}/layer_{layer:02d}", one, step)
                elif isinstance(value, dict):
                    for key, one in value.items():
                        writer.add_scalar(f"{name}/{key}", one, step)
                elif name != "step":
                    writer.add_scalar(TAGS.get(name, f"loss/{name}"), value, step)
        if evaluated and (routers := trainer.state.model.routers):
            layers = layers_of("max_violation", trainer.config.model)
            counts = [router.counts.tolist() for router in routers]
            writer.add_figure("experts/load", draw_loads(counts, layers, step), step)
        # On many ranks no one of them could generate by itself.
        alone = trainer.mesh.world_size == 1
        if evaluated and alone and (tokenizer := trainer.folder.tokenizer()):
            writer.add_text("sample", f"```\n{_sample(trainer, tokenizer)}\n```", step)
        return due

    def end(self, trainer: "Trainer") -> None:
        self._close()

    def _close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            with suppress(OSError):
                writer.close()


def _sample(trainer: "Trainer", tokenizer: Tokenizer) -> str:
    """What the model takes for the likeliest text after a prompt."""
    prompt = tokenizer.encode(PROMPT)
    steps = decode(
        trainer.state.model,
        [prompt],
        max_tokens=SAMPLE_TOKENS,
        end_of_document=tokenizer.end_of_document,
        vocab_size=tokenizer.vocab_size,
        dtype=trainer.dtype,
    )
    return tokenizer.decode(prompt + collect(steps)[0])

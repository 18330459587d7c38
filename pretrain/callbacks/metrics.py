"""The run's record: a line of JSON a step, and TensorBoard."""

import errno
import io
import json
import logging
import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...data.tokenizer import Tokenizer
from ..config_file import dump_config
from ..expert_load import draw_loads
from ..generation import collect, decode
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
}
"""Where TensorBoard shows a metric; the rest are parts of the loss."""

PROMPT = "def "
SAMPLE_TOKENS = 48


class MetricsFile(Callback):
    """Appends each step's metrics to metrics.jsonl, floats in full precision.

    Steps that the disk refuses are kept, and written after a later one, once it takes them again.
    """

    _file: io.FileIO | None = None

    def start(self, trainer: "Trainer") -> None:
        self._path = trainer.folder.metrics_file
        self._unwritten = deque(_taken_up_at(trainer.state.step, self._path))
        self._refused = False
        self._write()

    def step(self, trainer: "Trainer", metrics: dict[str, Any]) -> None:
        self._unwritten.append(json.dumps(metrics).encode() + b"\n")
        self._write()

    def end(self, trainer: "Trainer") -> None:
        if self._file is not None:
            self._file.close()

    def _write(self) -> None:
        try:
            if self._file is None:
                self._file = _append_to(self._path)
            while self._unwritten:
                line = self._unwritten[0]
                if self._file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self._unwritten.popleft()
            self._refused = False
        except OSError as error:
            if not self._refused:
                logger.warning("%s: not written: %s; kept for later", self._path, error.strerror)
            self._refused = True
            # Opened anew, since a mount that comes back has other files, and since a line may be cut short.
            if self._file is not None:
                self._file.close()
                self._file = None


def _taken_up_at(step: int, path: Path) -> list[bytes]:
    """The line of this step once more, where a life that died has some beyond it, which that supersedes."""
    try:
        for count, (other, line) in enumerate(walk_back(path, path.stat().st_size)):
            if other <= step:
                return [line + b"\n"] if other == step and count else []
    except OSError:
        pass
    return []


def _append_to(path: Path) -> io.FileIO:
    file = path.open("ab+", buffering=0)
    # A run that was killed while it wrote a line, or met a full disk, leaves a part of one.
    if file.seek(0, io.SEEK_END):
        file.seek(-1, io.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")
    return file


class TensorBoard(Callback):
    """Scalars at the log's interval, the config once; where the run is evaluated, the experts' loads as a
    picture and a generated text. Once the disk has refused something, there is no more of it in this run."""

    _writer: "SummaryWriter | None" = None

    def start(self, trainer: "Trainer") -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        folder, step = trainer.folder.tensorboard, trainer.state.step
        with self._surviving(folder):
            # What lies beyond the step taken up again is of a life that ended; it would be drawn twice.
            self._writer = SummaryWriter(str(folder), purge_step=step + 1)
            self._writer.add_text("config", f"```yaml\n{dump_config(trainer.config)}\n```", step)

    def step(self, trainer: "Trainer", metrics: dict[str, Any]) -> None:
        if self._writer is not None:
            with self._surviving(trainer.folder.tensorboard):
                self._record(self._writer, trainer, metrics)

    def _record(self, writer: "SummaryWriter", trainer: "Trainer", metrics: dict[str, Any]) -> None:
        step = metrics["step"]
        evaluated = "validation_loss" in metrics
        if evaluated or step % trainer.config.log.every == 0:
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

    def end(self, trainer: "Trainer") -> None:
        if self._writer is not None:
            with self._surviving(trainer.folder.tensorboard):
                self._writer.close()

    @contextmanager
    def _surviving(self, folder: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            logger.warning("%s: not written: %s; left out until the next start", folder, error.strerror)
            self._writer = None


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

"""The run's record: a line of JSON a step, and TensorBoard."""

import io
import json
from typing import TYPE_CHECKING, Any

from ...data.tokenizer import Tokenizer
from ..config_file import dump_config
from ..expert_load import draw_loads
from ..generation import collect, decode
from ..layer_metrics import layers_of
from .base import Callback

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

    from ..trainer import Trainer

__all__ = ["MetricsFile", "TensorBoard"]

TAGS = {
    "loss": "loss/training",
    "validation_loss": "loss/validation",
    "grad_norm": "optimizer/grad_norm",
    "lr": "optimizer/lr",
    "tokens": "optimizer/tokens",
    "tokens_per_second": "speed/tokens_per_second",
    "step_seconds": "speed/step_seconds",
    "data_seconds": "speed/data_seconds",
    "mfu": "speed/mfu",
}
"""Where TensorBoard shows a metric; the rest are parts of the loss."""

PROMPT = "def "
SAMPLE_TOKENS = 48


class MetricsFile(Callback):
    """Appends each step's metrics to metrics.jsonl, floats in full precision."""

    _file: io.TextIOBase

    def start(self, trainer: "Trainer") -> None:
        path = trainer.folder.metrics_file
        # A run that was killed while it wrote a line leaves a part of one.
        cut = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        self._file = path.open("a", encoding="utf-8")
        if cut:
            self._file.write("\n")

    def step(self, trainer: "Trainer", metrics: dict[str, Any]) -> None:
        self._file.write(json.dumps(metrics) + "\n")
        self._file.flush()

    def end(self, trainer: "Trainer") -> None:
        if hasattr(self, "_file"):
            self._file.close()


class TensorBoard(Callback):
    """Scalars at the log's interval, the config once; where the run is evaluated, the experts' loads as a
    picture and a generated text."""

    _writer: "SummaryWriter | None" = None

    def start(self, trainer: "Trainer") -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        # What lies beyond the step taken up again is of a life that ended; it would be drawn twice.
        self._writer = SummaryWriter(str(trainer.folder.tensorboard), purge_step=trainer.state.step + 1)
        self._writer.add_text("config", f"```yaml\n{dump_config(trainer.config)}\n```", trainer.state.step)

    def step(self, trainer: "Trainer", metrics: dict[str, Any]) -> None:
        writer, step = self._writer, metrics["step"]
        assert writer is not None
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
            self._writer.close()


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

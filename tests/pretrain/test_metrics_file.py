"""metrics.jsonl over restarts: which lines count, how much is read, and a disk that takes none."""

import errno
import json
import random
import resource
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from plait.errors import UserError
from plait.pretrain.callbacks import Callback, Checkpointing, MetricsFile, TensorBoard
from plait.pretrain.config_file import parse_config
from plait.pretrain.metrics_file import read_metrics, walk_back
from plait.pretrain.run_folder import RunFolder
from plait.pretrain.trainer import Trainer

REACH = 1 << 20


def line(step: int, **more: Any) -> bytes:
    return json.dumps({"step": step, **more}).encode() + b"\n"


def steps_of(path) -> list[int]:
    """The steps that count; forwards and backwards agree."""
    forwards = [record["step"] for record in read_metrics(path)]
    assert [step for step, _ in walk_back(path, REACH)] == forwards[::-1]
    return forwards


def test_a_step_supersedes_all_before_it_that_are_not_earlier(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lives = [*range(1, 51), *range(41, 46)]
    path.write_bytes(b"".join(line(step, life=i >= 50, pad="x" * 3000) for i, step in enumerate(lives)))
    assert steps_of(path) == list(range(1, 46))
    assert [record["step"] for record in read_metrics(path) if record["life"]] == list(range(41, 46))

    draw = random.Random(3)
    for _ in range(100):
        order = [draw.randrange(1, 12) for _ in range(draw.randrange(1, 20))]
        path.write_bytes(b"".join(line(step, at=i) for i, step in enumerate(order)))
        counts = [i for i, step in enumerate(order) if all(later > step for later in order[i + 1 :])]
        steps_of(path)
        assert [record["at"] for record in read_metrics(path)] == counts


@pytest.mark.parametrize(
    "rubbish",
    [
        b'{"step": 2, "lo\n',
        b'{"step": 2}x\n',
        b"\0" * 5000 + b"\n",
        b"\xff\xfe\n",
        b'{"step": true}\n',
        b"[" * 9999,
        b"3\n",
    ],
    ids=str,
)
def test_lines_that_are_none_are_passed_over(tmp_path, rubbish):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(1) + rubbish + b"\n" + line(2) + line(3) + line(4)[:-4])
    assert steps_of(path) == [1, 2, 3]


def test_the_end_is_read_of_a_file_of_any_size(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with path.open("wb") as file:
        file.truncate(1 << 36)
        file.seek(0, 2)
        file.write(b"\n" + line(7, pad="x" * 200_000) + line(8))
    assert [step for step, _ in walk_back(path, REACH)] == [8, 7]
    assert [step for step, _ in walk_back(path, 1000)] == [8]


def test_nothing_to_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(UserError) as error:
        read_metrics(path)
    assert str(error.value) == f"{path}: no metrics are here; name the folder of a run that has begun"
    path.write_bytes(b'{"step": 1, "lo')
    with pytest.raises(UserError) as error:
        read_metrics(path)
    assert str(error.value) == f"{path}: holds no step yet; wait for the first, or name another run"


class Fail(Callback):
    def __init__(self, at: int) -> None:
        self.at = at

    def step(self, trainer, metrics):
        if metrics["step"] == self.at:
            raise RuntimeError("no")


def test_what_a_dead_life_did_beyond_the_living_one_is_gone_for_all_readers(tiny):
    tiny["model"]["pattern"] = "M"
    tiny["log"] = {"every": 1, "tensorboard": True}
    with pytest.raises(RuntimeError):
        Trainer(parse_config(tiny, "test"), [MetricsFile(), TensorBoard(), Fail(7), Checkpointing()]).run()
    metrics = RunFolder(tiny["run"]["dir"]).metrics_file
    assert steps_of(metrics) == [1, 2, 3, 4, 5, 6, 7]
    # Taken up, and ended before a step.
    tiny["train"]["stop_at"] = 4
    Trainer(parse_config(tiny, "test"), [MetricsFile()]).run()
    assert steps_of(metrics) == [1, 2, 3, 4]
    assert metrics.read_bytes().splitlines()[3] == metrics.read_bytes().splitlines()[7]
    tiny["train"]["stop_at"] = 5
    again = Trainer(parse_config(tiny, "test"), [MetricsFile(), TensorBoard()])
    assert again.resumed_from == 4
    again.run()
    assert steps_of(again.folder.metrics_file) == [1, 2, 3, 4, 5]
    assert [record["samples"] for record in read_metrics(again.folder.metrics_file)] == [4, 8, 12, 16, 20]
    events = EventAccumulator(str(again.folder.tensorboard))
    events.Reload()
    for tag in ("loss/training", "optimizer/samples"):
        assert [event.step for event in events.Scalars(tag)] == [1, 2, 3, 4, 5]


@pytest.fixture
def trainer(tmp_path) -> Trainer:
    """As much of one as `MetricsFile` sees."""
    return cast(Trainer, SimpleNamespace(folder=RunFolder(tmp_path), state=SimpleNamespace(step=0)))


def test_steps_that_the_disk_refuses_come_later(trainer, caplog):
    path = trainer.folder.metrics_file
    path.symlink_to("/dev/full")
    file = MetricsFile()
    file.start(trainer)
    for step in (1, 2):
        file.step(trainer, {"step": step})
    path.unlink()
    for step in (3, 4):
        file.step(trainer, {"step": step})
    file.end(trainer)
    assert steps_of(path) == [1, 2, 3, 4]
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: cannot be written: No space left on device; its lines wait for better days",
        f"{path}: is written again",
    ]


def test_a_line_cut_by_a_full_disk_is_written_again(trainer):
    path = trainer.folder.metrics_file
    file = MetricsFile()
    file.start(trainer)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Beyond it a write takes what still fits, and the next nothing.
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, unlimited[1]))
    try:
        for step in (1, 2, 3):
            file.step(trainer, {"step": step, "loss": 0.5})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert steps_of(path) == [1]
    assert path.read_text().count("\n") == 1
    file.step(trainer, {"step": 4, "loss": 0.5})
    file.end(trainer)
    assert steps_of(path) == [1, 2, 3, 4]
    assert path.read_text().count("\n") == 4


def test_tensorboard_is_left_out_where_the_disk_refuses(tiny, monkeypatch, caplog):
    from torch.utils.tensorboard.writer import SummaryWriter

    def refuse(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", refuse)
    tiny["model"]["pattern"] = "M"
    tiny["train"]["steps"] = 8
    trainer = Trainer(parse_config(tiny, "test"), [TensorBoard()])
    assert trainer.run()
    assert caplog.text.count(f"{trainer.folder.tensorboard}: cannot be written: ") == 1

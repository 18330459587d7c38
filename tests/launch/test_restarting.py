"""Which deaths of a run's ranks are followed by another life, and how many lives may lead nowhere."""

import os
import signal
from collections.abc import Callable

import pytest
import torch

from plait.errors import UserError
from plait.launch import local
from plait.launch.lives import Life, begin_under_torchrun
from plait.launch.rank_process import life
from plait.pretrain.checkpoint import Checkpoints
from plait.pretrain.run_folder import RunFolder

Deed = Callable[[], tuple[str, str, int] | None]


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.make()
    return folder


def save(folder: RunFolder, step: int) -> None:
    Checkpoints(folder.checkpoints, keep=3).save(step, {"a": torch.zeros(2)}, {})


def dies() -> tuple[str, str, int]:
    return "", "rank 1 was killed", 1


@pytest.fixture
def launch(folder, monkeypatch, capsys):
    """Launch ranks of which each life is a function."""

    def run(*lives: Deed, max_restarts: int = 2) -> tuple[int, list[str], list[int]]:
        numbers, left = [], list(lives)

        def live(*_: object) -> tuple[str, str, int] | None:
            numbers.append(life())
            return left.pop(0)()

        monkeypatch.setattr(local, "_live", live)
        logs = folder.log_file(0).parent
        status = local.launch_ranks(["true"], 2, logs, folder.checkpoints, max_restarts)
        assert not left
        return status, capsys.readouterr().err.splitlines(), numbers

    yield run
    for name in ("PLAIT_LAUNCHED", "PLAIT_LIFE"):
        os.environ.pop(name, None)


def test_lives_without_a_newer_checkpoint_are_counted_and_a_newer_one_begins_anew(folder, launch):
    def saves(step: int) -> Deed:
        def deed() -> tuple[str, str, int]:
            save(folder, step)
            return dies()

        return deed

    status, err, numbers = launch(dies, dies, saves(4), dies, saves(8), dies, dies)
    assert (status, numbers) == (1, [0, 1, 2, 3, 4, 5, 6])
    killed = "plait: rank 1 was killed; going on from"
    assert err == [
        f"{killed} the start (restart 1 of 2)",
        f"{killed} the start (restart 2 of 2)",
        f"{killed} step 4 (restart 1 of 2)",
        f"{killed} step 4 (restart 2 of 2)",
        f"{killed} step 8 (restart 1 of 2)",
        f"{killed} step 8 (restart 2 of 2)",
        "plait: error: no progress beyond step 8 after 2 restarts; the last time: rank 1 was killed",
    ]


def test_a_checkpoint_that_was_lost_and_saved_again_is_progress(folder):
    save(folder, 4)
    save(folder, 8)
    begun = Life.first(folder.checkpoints)
    (folder.checkpoints / "step-00000008" / "rank-00000.bin").write_bytes(b"")
    assert begun.following(folder.checkpoints) == Life(4, 1, restarts=1)
    begun = begun.following(folder.checkpoints)
    save(folder, 8)
    assert begun.following(folder.checkpoints).restarts == 1
    assert begun.following(folder.checkpoints).following(folder.checkpoints).restarts == 2


@pytest.mark.parametrize("ending", ["well", "by a mistake", "asked to stop", "without restarts"])
def test_what_does_not_begin_another_life(launch, ending):
    def asked() -> tuple[str, str, int]:
        os.kill(os.getpid(), signal.SIGUSR1)
        return dies()

    deed: Deed = {
        "well": lambda: None,
        "by a mistake": lambda: ("", "data.blend = x: no such file", 2),
        "asked to stop": asked,
        "without restarts": dies,
    }[ending]
    status, err, _ = launch(deed, max_restarts=0 if ending == "without restarts" else 2)
    line = {"well": [], "by a mistake": ["plait: error: data.blend = x: no such file"]}
    assert err == line.get(ending, ["plait: error: rank 1 was killed"])
    assert status == {"well": 0, "by a mistake": 2}.get(ending, 1)


def test_signals_between_two_lives_are_heard(launch, monkeypatch):
    said: list[str] = []
    often: list[str] = []

    def tell(text: str) -> None:
        said.append(text)
        if any(part in text for part in often):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("plait.parallel.failures.tell", tell)
    before = signal.getsignal(signal.SIGTERM)
    for part, status, line in (
        ("going on", 75, "plait: stopped before that; the same command goes on"),
        ("stopped before", 143, "plait: ended by SIGTERM; the same command goes on"),
    ):
        often.append(part)
        assert launch(dies)[0] == status
        assert said[-1] == line
        assert signal.getsignal(signal.SIGTERM) == before


def test_under_torchrun_the_first_rank_counts(folder, monkeypatch):
    def begin(count: int, run_id: str = "a") -> None:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", run_id)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(count))
        assert begin_under_torchrun(folder, 2) >= 0

    begin(0)
    begin(1)
    save(folder, 4)
    begin(2)
    begin(3)
    line = r"no progress beyond step 4 after 2 restart\(s\), which is launch.max_restarts; what .*/logs"
    for count in (4, 5):
        with pytest.raises(UserError, match=line):
            begin(count)
    # The machines of a launch may count differently, but then the launcher is the same.
    with pytest.raises(UserError, match=line):
        begin(0)
    # Another launch, under another name or under the same.
    begin(0, "b")
    begin(1, "b")
    monkeypatch.setattr("plait.launch.lives._launcher", lambda: "another")
    for count in (0, 1, 2):
        begin(count, "b")
    with pytest.raises(UserError, match=line):
        begin(3, "b")
    folder.lives_file.write_text("[")
    begin(0, "b")

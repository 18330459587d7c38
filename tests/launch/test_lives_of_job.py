"""What a job on a cluster does with its run, from one life to the next."""

import json
import time
from pathlib import Path

import pytest

from plait.launch.cluster.jobs import launch_folder
from plait.launch.cluster.lives_of_job import AGAIN, begin_life, end_life
from plait.launch.lives import Life
from plait.pretrain.config_file import dump_config, parse_config
from plait.pretrain.run_folder import RunFolder, write_status


@pytest.fixture
def run(tiny) -> Path:
    tiny |= {"parallel": {"sp": 2}, "launch": {"max_restarts": 2, "fallback_layouts": [{}]}}
    folder = RunFolder(tiny["run"]["dir"])
    folder.make()
    launch_folder(folder.path).mkdir()
    (launch_folder(folder.path) / "config.yaml").write_text(dump_config(parse_config(tiny, "test")))
    return folder.path


def tell(run: Path, state: str, step: int, reason: str | None = None, *, mistake: bool = False) -> None:
    time.sleep(0.001)
    write_status(RunFolder(run), state, step, reason, mistake=mistake)


def test_a_life_begins_on_as_many_nodes_as_the_layout_needs(run):
    assert begin_life(run, "7-0", ["a", "b", "c"], 1) == (2, 1, ["a", "b"])
    assert begin_life(run, "7-1", ["b"], 1) == (1, 1, ["b"])
    notes = [line.partition("  ")[2] for line in (run / "run.log").read_text().splitlines()]
    assert notes == ["job 7-0: 2 ranks on a,b", "job 7-1: 1 rank on b, fallback layout one rank"]


def test_nothing_is_begun_where_nothing_is_left(run):
    tell(run, "finished", 12)
    assert begin_life(run, "7-0", ["a", "b"], 1) is None
    # A longer schedule is another matter.
    tell(run, "finished", 11)
    assert begin_life(run, "7-0", ["a", "b"], 1) is not None


ENDS = {
    "finished": (("finished", 12), (0, "finished at step 12")),
    "at the step asked for": (("stopped", 5), (0, "stopped at step 5")),
    "stopped": (("stopped", 5, "SIGTERM asked for it"), (75, "stopped at step 5: SIGTERM asked for it")),
    "a rank died": (
        ("running", 5),
        (AGAIN, "ranks ended without a word; going on from the start (restart 1 of 2)"),
    ),
    "an error": (
        ("failed", 5, "ValueError: odd"),
        (AGAIN, "failed: ValueError: odd; going on from the start (restart 1 of 2)"),
    ),
}


@pytest.mark.parametrize("end", ENDS)
def test_the_end_of_a_life_says_what_follows(end, run):
    told, expected = ENDS[end]
    begin_life(run, "7-0", ["a", "b"], 1)
    tell(run, *told)
    assert end_life(run, "7-0") == expected


def test_a_mistake_is_met_once(run):
    begin_life(run, "7-0", ["a", "b"], 1)
    tell(run, "failed", 0, "no such file", mistake=True)
    assert end_life(run, "7-0") == (2, "failed: no such file")


def test_what_an_earlier_life_told_does_not_count(run):
    tell(run, "stopped", 5, "SIGTERM asked for it")
    time.sleep(0.01)
    begin_life(run, "7-1", ["a", "b"], 1)
    assert end_life(run, "7-1")[0] == AGAIN


def test_lives_without_progress_come_to_an_end(run, monkeypatch):
    saved = [Life(None, 0)]
    monkeypatch.setattr(Life, "first", lambda checkpoints: saved[-1])

    def live() -> tuple[int, str]:
        assert begin_life(run, "7-0", ["a", "b"], 1) is not None
        tell(run, "running", 1)
        return end_life(run, "7-0")

    assert [live()[0] for _ in range(2)] == [AGAIN, AGAIN]
    saved.append(Life(4, 1))
    assert live() == (AGAIN, "ranks ended without a word; going on from step 4 (restart 1 of 2)")
    assert live()[0] == AGAIN
    line = (
        "no progress beyond step 4 after 2 restarts, which is launch.max_restarts; ranks ended without a word"
    )
    assert live() == (1, line)
    # Back in the queue, the count begins anew.
    begin_life(run, "7-1", ["a", "b"], 1)
    assert json.loads((launch_folder(run) / "life.json").read_text())["restarts"] == 0


def test_a_jobs_own_wish_to_stop_does_not_outlive_it(run):
    stop = run / "stop"
    stop.write_text("Slurm job 7: SIGUSR1\n")
    begin_life(run, "7-1", ["a", "b"], 1)
    assert not stop.exists()
    stop.write_text("enough\n")
    begin_life(run, "7-2", ["a", "b"], 1)
    assert stop.exists()

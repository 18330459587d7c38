"""Runs on a real Slurm: stopped, requeued and resumed, with the losses of a run that nobody stopped."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import yaml
from submitted import Submitted

from plait.pretrain.config_file import parse_config
from plait.pretrain.metrics_file import read_metrics
from plait.pretrain.trainer import Trainer

MOST = 1e-9
"""Relative; float64 on two ranks against one."""


@pytest.fixture
def run(tiny, cluster) -> Submitted:
    return Submitted(Path(tiny["run"]["dir"]), cluster)


def losses(file) -> dict[int, tuple[float, float]]:
    return {record["step"]: (record["loss"], record["grad_norm"]) for record in read_metrics(file)}


def assert_undisturbed(run: Submitted, config, tmp_path) -> None:
    """The run has all its steps, with the numbers of one rank that nobody stopped."""
    tree = yaml.safe_load(config.read_text())
    tree |= {"parallel": {}, "launch": {}, "run": {"dir": str(tmp_path / "alone"), "seed": 3}}
    trainer = Trainer(parse_config(tree, "alone"))
    steps = tree["train"]["steps"]
    expected = {}
    with trainer._loader() as loader:
        while trainer.state.step < steps:
            batch, _ = loader.next()
            record = trainer.train_step(batch)
            expected[record["step"]] = (record["loss"], record["grad_norm"])
    trainer.close()
    found = losses(run.folder / "metrics.jsonl")
    assert found.keys() == expected.keys()
    for step, numbers in expected.items():
        assert found[step] == pytest.approx(numbers, rel=MOST), step


def test_a_run_is_stopped_requeued_and_falls_back_to_one_node(plait, run, config, tmp_path, one_thread):
    status, out, err = plait("launch", "slurm", config, "--nodes", 2, "--min-nodes", 1, "--no-self-test")
    assert (status, err) == (0, "")
    assert f"submitted job {run.job}: " in out
    run.wait_for_steps(8)
    status, out, _ = plait("launch", "status", run.folder)
    row = out.splitlines()[1].split()
    assert row[:2] == [str(run.job), "running"]
    assert row[5] == "n[1-2]"
    assert "2 ranks: sp 2" in plait("launch", "logs", run.folder, "-n", 1000)[1]
    assert "plait.pretrain" in plait("launch", "logs", run.folder, "--rank", 1)[1]

    # Its end is near: what Slurm sends before the time limit.
    run.cluster.ask("scancel", "--signal=USR1", "--batch", str(run.job))
    run.wait(lambda: "back into the queue" in run.log)
    stopped = run.step
    run.wait(lambda: f"job {run.job}-1 on n1,n2" in run.log)
    run.wait_for_steps(4)
    assert f"resumed from the checkpoint of step {stopped} " in run.log
    assert "asked for it (Slurm job" in (run.folder / "run.log").read_text()

    # A node goes down: Slurm itself requeues the job, on the node that is left.
    run.cluster.node("n2", "down")
    run.wait(lambda: f"job {run.job}-2 on n1\n" in run.log)
    run.wait_for_end()
    assert run.state == "COMPLETED"
    log = (run.folder / "run.log").read_text()
    assert f"job {run.job}-2: 1 rank on n1, fallback layout one rank" in log
    assert "finished: step 60 of 60" in log
    # What the folder says of the run is what was asked for.
    assert yaml.safe_load((run.folder / "config.yaml").read_text())["parallel"]["sp"] == 2
    assert_undisturbed(run, config, tmp_path)


@pytest.mark.long
def test_a_node_that_comes_back_and_a_killed_rank(plait, run, config, tmp_path, one_thread):
    plait("launch", "slurm", config, "--nodes", 2, "--no-self-test")
    run.wait_for_steps(6)
    run.cluster.node("n2", "down")
    run.wait(lambda: run.state == "PENDING")
    run.cluster.node("n2", "resume")
    run.wait(lambda: f"job {run.job}-1 on n1,n2" in run.log)
    run.wait_for_steps(4)
    # Rank 0 is the first word of the lock.
    os.kill(int((run.folder / ".lock").read_text().split()[0]), signal.SIGKILL)
    run.wait(lambda: "the run is started again" in run.log)
    run.wait_for_end()
    assert run.state == "COMPLETED"
    assert_undisturbed(run, config, tmp_path)


def test_cancel(plait, run, config):
    # Nothing is asked of the nodes' speed: both are this machine.
    options = ["--nodes", 2, "--slow", 0, "--chain", 2]
    plait("launch", "slurm", config, *options, "train.steps=100000")
    run.wait_for_steps(2)
    assert "self-test: n1, n2 are good" in (run.folder / "run.log").read_text()
    _, _, err = plait("launch", "slurm", config, "--nodes", 2)
    assert err.startswith(f"plait: error: {run.folder}: its job {run.job} is running; wait for it, or")
    _, out, _ = plait("launch", "cancel", run.folder)
    assert out.splitlines()[0] == f"job {run.job + 1} has left the queue"
    assert out.splitlines()[1].startswith(f"job {run.job} stops after its step, with a checkpoint")
    run.wait_for_end()
    assert run.state == "COMPLETED"
    step = run.step
    assert (run.folder / "checkpoints" / f"step-{step:08d}").is_dir()
    assert plait("launch", "cancel", run.folder)[1] == "no job of this run is in the queue\n"


@pytest.mark.long
def test_a_preempted_job_saves_and_goes_on(plait, run, config, tmp_path, one_thread):
    plait("launch", "slurm", config, "--nodes", 2, "--no-self-test")
    run.wait_for_steps(4)
    urgent = run.cluster.ask(
        *("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive"),
        *("--output=/dev/null", "--wrap", "sleep 1"),
    )
    run.wait(lambda: "USR1: the run is to stop" in run.log)
    run.wait(lambda: run.state == "PENDING")
    run.wait(lambda: not run.cluster.ask("squeue", "-h", "-j", urgent.strip(), "-t", "PD,R").strip())
    run.wait_for_end()
    assert run.state == "COMPLETED"
    assert_undisturbed(run, config, tmp_path)


@pytest.mark.long
def test_a_sick_node_is_named_and_left_out(plait, run, config, tmp_path, one_thread):
    sick = tmp_path / "env.sh"
    sick.write_text('if [ "$SLURMD_NODENAME" = n2 ]; then exit 7; fi\n')
    plait("launch", "slurm", config, "--nodes", 2, "--slow", 0, "--env-file", sick)
    run.wait_for_end()
    assert run.state == "FAILED"
    assert "n2" in (run.folder / "run.log").read_text().splitlines()[-1]
    options = ["--min-nodes", 1, "--exclude-bad-nodes"]
    plait("launch", "slurm", config, "--nodes", 2, "--slow", 0, "--env-file", sick, *options)
    run.wait_for_end()
    assert run.state == "COMPLETED"
    assert "going on without the nodes that failed the self-test: n1\n" in run.log
    assert_undisturbed(run, config, tmp_path)


@pytest.mark.long
def test_the_doctor_looks_at_nodes_of_the_cluster(plait, cluster, tmp_path):
    words = ["launch", "doctor", tmp_path, "--nodes", 2, "--device", "cpu", "--slow", 0, "--free", 1]
    status, out, _ = plait(*words)
    assert status == 0, out
    assert {"n1", "n2"} <= {line.split()[0] for line in out.splitlines() if line.strip()}


def test_a_mistake_is_told_on_the_login_node(plait, run, config, cluster):
    before = cluster.ask("squeue", "-h", "-t", "all", "-o", "%i").split()
    mistakes = {
        "data.blend={nowhere/train: 1.0}": "nowhere/train.bin: no such file",
        "model.vocab_size=100": "model.vocab_size = 100 has fewer rows than the tokenizer",
        "parallel.tp=3": "parallel.tp = 3 does not divide",
    }
    for override, line in mistakes.items():
        status, out, err = plait("launch", "slurm", config, override, "--nodes", 2)
        assert (status, out) == (2, "")
        assert line in err
        assert err.count("\n") == 1
    _, _, err = plait("launch", "slurm", config, "--nodes", 2, "--partition", "nowhere")
    assert "invalid partition specified: nowhere" in err
    assert cluster.ask("squeue", "-h", "-t", "all", "-o", "%i").split() == before


@pytest.mark.long
def test_a_mistake_met_in_the_job_ends_it_and_those_that_wait_for_it(plait, run, config):
    # The shards are gone when the job begins.
    tree = yaml.safe_load(config.read_text())
    (prefix,) = tree["data"]["blend"]
    own = Path(tree["run"]["dir"]).parent / "own"
    own.mkdir()
    for file in Path(prefix).parent.iterdir():
        if file.is_file():
            shutil.copy(file, own)
    moved = f"data.blend={{{own}/{Path(prefix).name}: 1.0}}"
    run.cluster.node("n2", "down")
    plait(
        "launch", "slurm", config, moved, "data.validation=null", "--nodes", 2, "--no-self-test", "--chain", 2
    )
    shutil.rmtree(own)
    run.cluster.node("n2", "resume")
    run.wait_for_end()
    assert run.state == "FAILED"
    assert "no such file" in run.log
    assert f"job {run.job + 1} has left the queue" in run.log

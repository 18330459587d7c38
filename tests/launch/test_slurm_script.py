"""The batch script of `plait launch slurm`: what each option does to it, and the whole of it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from plait.launch.cluster.batch import TEMPLATE
from plait.launch.cluster.settings import ClusterSettings

GOLDEN = Path(__file__).with_name("golden_batch.sh")


@pytest.fixture
def plait(plait, monkeypatch, tmp_path):
    """Where no cluster file is."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    return plait


@pytest.fixture
def config(tiny, tmp_path) -> Path:
    tiny["parallel"] = {"dp_shard": 2, "sp": 2}
    tiny["launch"] = {"fallback_layouts": [{"sp": 2}]}
    file = tmp_path / "c.yaml"
    file.write_text(yaml.dump(tiny))
    return file


@pytest.fixture
def script(plait, config):
    """What `--dry-run` prints as the script, with these options; two nodes unless they say otherwise."""

    def of(*options) -> str:
        given = options if "--nodes" in options else ("--nodes", "2", *options)
        status, out, err = plait("launch", "slurm", config, *given, "--dry-run")
        assert (status, err) == (0, "")
        return out

    return of


# Every key of the settings: its option, and lines that it puts into the script or keeps out of it.
REACHES = {
    "nodes": (["--nodes", "4"], ["#SBATCH --nodes=4\n", "\nroom=1\n"], []),
    "min_nodes": (["--min-nodes", "1"], ["#SBATCH --nodes=1-2\n"], []),
    "gpus_per_node": (
        ["--gpus-per-node", "2"],
        ["#SBATCH --gpus-per-node=2\n", "\nroom=2\n"],
        ["--device cpu"],
    ),
    "cpus_per_rank": (["--cpus-per-rank", "6"], ["#SBATCH --cpus-per-task=12\n"], []),
    "partition": (["--partition", "gpu"], ["#SBATCH --partition=gpu\n"], []),
    "account": (["--account", "lab"], ["#SBATCH --account=lab\n"], []),
    "qos": (["--qos", "high"], ["#SBATCH --qos=high\n"], []),
    "time": (["--time", "1d11h50m"], ["#SBATCH --time=1-11:50:00\n"], []),
    "constraint": (["--constraint", "h100&ib"], ["#SBATCH --constraint=h100&ib\n"], []),
    "exclude": (["--exclude", "n[3-4],n7"], ["#SBATCH --exclude=n[3-4],n7\n"], []),
    "exclusive": (["--no-exclusive"], [], ["--exclusive\n"]),
    "signal_before": (
        ["--signal-before", "10m"],
        ["#SBATCH --signal=B:USR1@600\n", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"],
        [],
    ),
    "requeue": (["--no-requeue"], ["#SBATCH --no-requeue\n"], ["scontrol requeue"]),
    "container": (
        ["--container", "IMAGE"],
        ['apptainer exec --nv IMAGE "$python" -m plait.launch "$@"', "exec apptainer exec --nv IMAGE"],
        [],
    ),
    "container_options": (
        ["--container", "IMAGE", "--container-options", "--rocm -B /data"],
        ["exec apptainer exec --rocm -B /data IMAGE"],
        ["--nv"],
    ),
    "env_file": (["--env-file", "ENV"], ['. "$launch/env.sh"\n'], []),
    "interface": (
        ["--interface", "ib0"],
        ["NCCL_SOCKET_IFNAME:-ib0}", "GLOO_SOCKET_IFNAME:-ib0}"],
        [],
    ),
    "template": (["--template", "TEMPLATE"], ["mine: c on 2\n"], ["torch.distributed.run"]),
    "self_test": (["--no-self-test"], [], ['selftest "$2" --meet "$meet"\n', "plait judge"]),
    "exclude_bad_nodes": (["--exclude-bad-nodes"], ["going on without the nodes"], []),
    "slow": (["--slow", "0.5"], ["--slow 0.5 --names"], []),
    "sbatch": (
        ["--sbatch", "--mail-type=END", "--sbatch", "--comment=x y"],
        ["#SBATCH --mail-type=END\n", "#SBATCH --comment=x y\n"],
        [],
    ),
}


def only_script(printed: str, tmp_path: Path) -> str:
    """Without the command before it and the config after it."""
    return "#!" + printed.partition("#!")[2].partition(f"\n# {tmp_path}/run/launch/config.yaml\n")[0]


@pytest.mark.parametrize("key", REACHES)
def test_an_option_reaches_the_script(key, script, tmp_path):
    options, present, absent = REACHES[key]
    files = {"IMAGE": tmp_path / "i.sif", "ENV": tmp_path / "env", "TEMPLATE": tmp_path / "t"}
    for file in files.values():
        file.write_text("mine: {{ name[:0] }}c on {{ nodes }}\n")
    words = [str(files.get(word, word)) for word in options]
    text = script(*words)
    for part in present:
        assert part.replace("IMAGE", str(files["IMAGE"])) in text
    for part in absent:
        assert part not in text
    # The lines that speak of it are not there without it.
    if key not in ("nodes", "gpus_per_node"):
        assert script() != text


def test_no_option_is_forgotten_here():
    assert {*REACHES, "chain"} == set(ClusterSettings.model_fields)


def test_the_whole_script(script, config, tmp_path):
    options = ["--min-nodes", "1", "--partition", "gpu", "--time", "24h", "--interface", "ib0"]
    found = only_script(script(*options), tmp_path)
    found = found.replace(str(tmp_path / "run"), "/data/runs/base").replace(
        sys.executable, "/opt/plait/bin/python"
    )
    found = found.replace("--job-name=run", "--job-name=base")
    # To renew it: write `found` there, and read the difference.
    assert found == GOLDEN.read_text()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize(
    "options", [[], ["--no-self-test", "--no-requeue"], ["--exclude-bad-nodes", "--interface", "ib0"]]
)
def test_shellcheck_finds_nothing(options, script, tmp_path):
    text = script(*options)
    file = tmp_path / "batch.sh"
    file.write_text(only_script(text, tmp_path))
    done = subprocess.run(["shellcheck", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_users_file_gives_defaults_and_options_win(plait, config, tmp_path):
    file = tmp_path / "xdg" / "plait" / "cluster.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("nodes: 2\npartition: gpu\naccount: lab\nsbatch: [--mail-type=END]\n")
    _, out, _ = plait("launch", "slurm", config, "--partition", "debug", "--dry-run")
    assert "#SBATCH --partition=debug\n" in out
    assert "#SBATCH --account=lab\n" in out
    assert "#SBATCH --mail-type=END\n" in out
    status, out, _ = plait("launch", "show")
    rows = {line.split()[0]: line.split()[1:3] for line in out.splitlines()[3:]}
    assert status == 0
    assert rows["partition"] == ["gpu", "file"]
    assert rows["signal_before"] == ["300.0", "default"]


def test_the_template_is_shown_to_be_changed(plait):
    assert plait("launch", "show", "--template")[1] == TEMPLATE.read_text()


MISTAKES = {
    "ranks that fill no nodes": (
        ["--nodes", "3"],
        "--nodes = 3 does not divide the 4 ranks of parallel",
    ),
    "more room than ranks": (
        ["--nodes", "4", "--gpus-per-node", "4"],
        "--nodes = 4 and --gpus-per-node = 4 are 16 ranks, but parallel has 4",
    ),
    "fewer nodes than any layout needs": (
        ["--nodes", "4", "--min-nodes", "1"],
        "1 node of 1 does not hold the 4 ranks of parallel (dp_shard 2 x sp 2), and launch.fallback_layouts",
    ),
    "more at least than at most": (
        ["--nodes", "2", "--min-nodes", "3"],
        "--min-nodes = 3 exceeds --nodes = 2",
    ),
    "no time": (["--time", "soon"], "--time = soon: time = soon: give it as Slurm does"),
    "two words": (["--partition", "a b"], "--partition = a b: 'a b' is no word that Slurm takes"),
    "no such file": (["--env-file", "nowhere"], "--env-file = nowhere: no such file"),
    "no such image": (["--container", "nowhere"], "--container = nowhere: no such image"),
    "no such template": (["--template", "nowhere"], "--template = nowhere: cannot be read"),
    "a wrong key of the config": (["train.step=3"], "train.step=3: train.step is not a key"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_before_anything_is_submitted(mistake, plait, config):
    options, line = MISTAKES[mistake]
    given = options if "--nodes" in options else ["--nodes", "2", *options]
    status, out, err = plait("launch", "slurm", config, *given, "--dry-run")
    assert (status, out) == (2, "")
    assert err.startswith(f"plait: error: {line}")
    assert err.count("\n") == 1


def test_a_wrong_template_names_its_line(plait, config, tmp_path):
    file = tmp_path / "t"
    file.write_text("#!/bin/sh\n{% if %}\n")
    _, _, err = plait("launch", "slurm", config, "--nodes", "2", "--template", file, "--dry-run")
    assert err.startswith(f"plait: error: --template = {file}: ")
    assert err.rstrip().endswith("in line 2")
    file.write_text("{{ nods }}")
    _, _, err = plait("launch", "slurm", config, "--nodes", "2", "--template", file, "--dry-run")
    assert "'nods' is undefined" in err


def test_a_wrong_key_of_the_users_file_is_named(plait, config, tmp_path):
    file = tmp_path / "xdg" / "plait" / "cluster.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("partitoin: gpu\n")
    _, _, err = plait("launch", "show")
    assert err == f"plait: error: {file}: partitoin is not a key; `plait launch show` prints those that are\n"


def test_without_slurm_here_it_says_so(plait, config, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    status, _, err = plait("launch", "slurm", config, "--nodes", "2")
    assert status == 2
    assert err.startswith("plait: error: sbatch: no such command here")

"""A cluster that lives as long as the session, and a run that is submitted to it."""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))

from private_cluster import PrivateCluster, missing

from plait.pretrain.run_folder import RunFolder
from plait.pretrain.standing import standing_of

PATIENCE = 180.0

NO_SLURM = "nothing of plait on Slurm was tested here: "


@pytest.fixture(scope="session")
def private_cluster():
    if (reason := missing()) is not None:
        pytest.skip(f"{NO_SLURM}{reason}")
    # Not in the folder of the tests: a socket's path must be short.
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as folder:
        found = PrivateCluster(Path(folder))
        yield found
        found.stop()


@pytest.fixture
def cluster(private_cluster, monkeypatch, tmp_path):
    """The cluster with its nodes idle; this process may use it."""
    environment = {
        **{key: private_cluster.environment[key] for key in ("SLURM_CONF", "PATH")},
        "XDG_CONFIG_HOME": str(tmp_path / "xdg"),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    for key in [key for key in os.environ if key.startswith("SLURM_") and key != "SLURM_CONF"]:
        monkeypatch.delenv(key)
    private_cluster.idle()
    yield private_cluster
    private_cluster.idle()


class Submitted:
    """A run on the cluster, and what can be seen of it."""

    def __init__(self, folder: Path, cluster: PrivateCluster) -> None:
        self.folder, self.cluster = folder, cluster

    @property
    def job(self) -> int:
        last = (self.folder / "launch" / "jobs.jsonl").read_text().splitlines()[-1]
        return json.loads(last)["jobs"][0]

    def ask(self, form: str) -> str:
        return self.cluster.ask("squeue", "-h", "-j", str(self.job), "-t", "all", "-o", form).strip()

    @property
    def state(self) -> str:
        return self.ask("%T")

    @property
    def step(self) -> int:
        """The last that it has done."""
        return standing_of(RunFolder(self.folder)).step or 0

    @property
    def log(self) -> str:
        file = self.folder / "logs" / f"slurm-{self.job}.log"
        return file.read_text() if file.exists() else ""

    def wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, f"{self.ask('%T %r %N')}\n{self.log}"
            time.sleep(0.1)

    def wait_for_steps(self, more: int) -> None:
        goal = self.step + more
        self.wait(lambda: self.step >= goal)

    def wait_for_end(self) -> None:
        self.wait(lambda: self.state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"))


@pytest.fixture
def config(tiny, tmp_path) -> Path:
    """Sequences on two nodes, and a layout for one."""
    tiny["parallel"] = {"sp": 2}
    tiny["launch"] = {"fallback_layouts": [{}]}
    tiny["train"] |= {"steps": 60, "dtype": "float64", "device": "cpu"}
    tiny["checkpoint"] |= {"every": 5}
    tiny["evaluate"] |= {"every": 1000}
    tiny["log"] |= {"every": 1}
    file = tmp_path / "c.yaml"
    file.write_text(yaml.dump(tiny))
    return file

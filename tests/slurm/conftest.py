"""A cluster that lives as long as the session, and the config of a run for it."""

import os
import sys
import tempfile
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))

from private_cluster import PrivateCluster, missing

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

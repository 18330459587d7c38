"""A Slurm cluster of two nodes on this machine, in a folder of its own: loopback only, nothing under /etc.

It runs Debian's own slurmctld, slurmd and munged as processes of the tests, and ends them.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

__all__ = ["PrivateCluster", "missing"]

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "squeue", "scontrol")
PATIENCE = 30.0

CONFIG = """\
ClusterName=plait
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# Short, or a requeued job waits for two minutes.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=1
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MinJobAge=300
KillWait=5
JobRequeue=1
SlurmctldTimeout=30
SlurmdTimeout=60
MessageTimeout=30
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
NodeName=DEFAULT CPUs=8 RealMemory=4000 State=UNKNOWN
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}]
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
"""


def missing() -> str | None:
    """Why there can be no cluster here; None where there can."""
    if os.geteuid() != 0:
        return "Slurm's daemons need root"
    # Debian puts daemons where not every user looks.
    lacking = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if lacking:
        packages = "slurmd slurmctld slurm-client munge"
        return f"{', '.join(lacking)} not found; apt-get install --no-install-recommends {packages}"
    return None


class PrivateCluster:
    """Started when it is made; `stop` ends it.

    Attributes:
        environment: for processes that use it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}
        host = socket.gethostname().partition(".")[0]
        ports = _free_ports(3)
        for name in ("state", "spool", "log", "run", "munge"):
            (folder / name).mkdir(parents=True)
        text = CONFIG.format(host=host, folder=folder, port=ports[0], first=ports[1], last=ports[2])
        (folder / "slurm.conf").write_text(text)
        munge = folder / "munge"
        # munged trusts no path that others could write to.
        for path in (folder, munge, *folder.parents):
            if path.stat().st_uid == os.geteuid() and path.stat().st_mode & 0o022 and path != Path("/tmp"):
                path.chmod(path.stat().st_mode & ~0o022)
        folder.chmod(0o755)
        munge.chmod(0o755)
        key = munge / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self._run(
            *("munged", "--force", f"--socket={munge}/socket", f"--key-file={key}", "--num-threads=2"),
            *(f"--pid-file={folder}/run/munged.pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed"),
        )
        self._await(lambda: self._answers("munge", "-n", "-S", f"{munge}/socket"))
        self._run("slurmctld", "-c", "-f", str(folder / "slurm.conf"))
        for node in ("n1", "n2"):
            self._run("slurmd", "-N", node, "-f", str(folder / "slurm.conf"))
        self._await(lambda: self.ask("sinfo", "-h", "-t", "idle", "-o", "%D", "-p", "batch").strip() == "2")

    def ask(self, *words: str) -> str:
        """What a command of Slurm's prints; nothing where it fails."""
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=PATIENCE)
        return done.stdout

    def node(self, name: str, state: str) -> None:
        """Set a node down or bring it back."""
        self._run("scontrol", "update", f"nodename={name}", f"state={state}", "reason=test")

    def idle(self) -> None:
        """Bring all nodes back, and end all jobs."""
        self.ask("scancel", "--user=root")
        self._await(lambda: not self.ask("squeue", "-h").strip())
        down = self.ask("sinfo", "-h", "-N", "-t", "down,drain", "-o", "%N", "-p", "batch").split()
        for name in down:
            self.node(name, "resume")
        self._await(lambda: self.ask("sinfo", "-h", "-t", "idle", "-o", "%D", "-p", "batch").strip() == "2")

    def stop(self) -> None:
        pids = [int(file.read_text()) for file in (self.folder / "run").glob("*.pid")]
        self.ask("scancel", "--user=root")
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in pids:
                if _lives(pid):
                    os.kill(pid, number)
            deadline = time.monotonic() + 10
            while any(map(_lives, pids)) and time.monotonic() < deadline:
                time.sleep(0.05)

    def _run(self, *words: str) -> None:
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, f"{words}: {done.stderr}"

    def _answers(self, *words: str) -> bool:
        return subprocess.run(words, env=self.environment, capture_output=True).returncode == 0

    def _await(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, "\n".join(
                file.read_text()[-2000:] for file in (self.folder / "log").iterdir()
            )
            time.sleep(0.1)


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def _free_ports(count: int) -> list[int]:
    """Neighbours, for Slurm names them as a range."""
    while True:
        with socket.socket() as first:
            first.bind(("127.0.0.1", 0))
            start = first.getsockname()[1]
        ports = list(range(start, start + count))
        sockets = [socket.socket() for _ in ports]
        try:
            for one, port in zip(sockets, ports, strict=True):
                one.bind(("127.0.0.1", port))
            return ports
        except OSError:
            continue
        finally:
            for one in sockets:
                one.close()


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True

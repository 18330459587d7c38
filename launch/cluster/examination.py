"""The self-test on nodes of a cluster, apart from any run."""

import shutil
import subprocess
from pathlib import Path

from ...errors import UserError
from .batch import batch_script, request
from .jobs import launch_folder
from .settings import ClusterSettings

__all__ = ["examine_nodes"]


def examine_nodes(folder: Path, settings: ClusterSettings, *, gpus: bool) -> tuple[Path, list[str]]:
    """Have nodes test themselves, through srun, which waits for them as long as it takes.

    Args:
        folder: a run's, or any that the nodes see.
        settings: with `gpus_per_node` resolved.

    Returns:
        the folder of the nodes' reports, and the nodes' names.

    Raises:
        UserError: there is no Slurm here, it refuses, or the nodes do not see the folder.
    """
    launch = launch_folder(folder.absolute())
    reports = launch / "self-test" / "doctor"
    shutil.rmtree(reports, ignore_errors=True)
    reports.mkdir(parents=True)
    script = launch / "self-test" / "batch.sh"
    script.write_text(batch_script(settings, folder.absolute(), gpus=gpus), encoding="utf-8")
    script.chmod(0o755)
    if settings.env_file is not None:
        shutil.copyfile(settings.env_file, launch / "env.sh")
    command = ["srun", f"--nodes={settings.nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=0"]
    try:
        subprocess.run([*command, *request(settings, gpus=gpus), str(script), "test", str(reports)])
    except FileNotFoundError:
        raise UserError(
            "srun: no such command here; do this on a machine of a Slurm cluster, or leave --nodes out"
        ) from None
    try:
        names = (reports / "nodes").read_text(encoding="utf-8").strip().split(",")
    except OSError:
        raise UserError(f"{reports}: no node has written there; see what srun said") from None
    return reports, names

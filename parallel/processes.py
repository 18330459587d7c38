"""A rank as a process: how it joins the others and leaves them."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from ..errors import UserError

__all__ = ["start_processes", "stop_processes"]


def start_processes(device: torch.device, timeout: float) -> None:
    """Join the ranks that torchrun, or `plait launch`, started; one rank alone joins nobody.

    Afterwards `torch.device("cuda")` is this rank's own GPU, and the ranks of a machine share its cores.

    Args:
        device: what the run computes on; decides the backends.
        timeout: seconds without progress after which the watchdog ends the run. Collectives wait for
            twice as long, so that it is the watchdog who speaks.

    Raises:
        UserError: more ranks on this machine than GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, _cores() // local_world_size))
    patience = timedelta(seconds=2 * timeout)
    if device.type != "cuda":
        dist.init_process_group("gloo", timeout=patience)
        return
    if local_world_size > torch.cuda.device_count():
        raise UserError(
            f"train.device = cuda with {local_world_size} ranks on a machine of {torch.cuda.device_count()} "
            "GPU(s); start as many ranks as there are GPUs, or set train.device = cpu"
        )
    torch.cuda.set_device(local_rank)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", timeout=patience, device_id=torch.device("cuda", local_rank)
    )


def stop_processes() -> None:
    """Leave the other ranks; nothing where there were none."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _cores() -> int:
    """Those that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

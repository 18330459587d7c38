"""A rank as a process: how it joins the others and leaves them."""

import logging
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..errors import UserError

__all__ = ["start_processes", "stop_processes"]

logger = logging.getLogger(__name__)


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
    meet = _meeting_place(patience)
    if device.type != "cuda":
        dist.init_process_group("gloo", timeout=patience, **meet)
        return
    if local_world_size > torch.cuda.device_count():
        raise UserError(
            f"train.device = cuda with {local_world_size} ranks on a machine of {torch.cuda.device_count()} "
            "GPU(s); start as many ranks as there are GPUs, or set train.device = cpu"
        )
    torch.cuda.set_device(local_rank)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", timeout=patience, device_id=torch.device("cuda", local_rank), **meet
    )


def _meeting_place(patience: timedelta) -> dict[str, Any]:
    """Where the ranks find each other, if not where torch would look.

    torchrun lends its own store to every life of the ranks alike, so that a later one reads the addresses of
    the dead. On one machine its count of restarts tells the lives apart; on several the machines may count
    differently.
    """
    borrowed = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not borrowed or os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return {}
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if os.environ.get("GROUP_WORLD_SIZE") != "1":
        if rank == 0:
            logger.warning(
                "the ranks will not find each other after a restart; start torchrun with "
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment"
            )
        return {}
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=patience,
    )
    life = os.environ["TORCHELASTIC_RESTART_COUNT"]
    return {"store": dist.PrefixStore(f"plait/life/{life}", store), "rank": rank, "world_size": world_size}


def stop_processes() -> None:
    """Leave the other ranks; nothing where there were none."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _cores() -> int:
    """Those that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

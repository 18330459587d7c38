"""Joining the ranks, choosing the failure that counts, and the watchdog of a rank alone."""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist

from plait.errors import UserError
from plait.parallel.failures import Failure, Kind, failure_of, verdict
from plait.parallel.processes import start_processes, stop_processes

CLOSED = "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:14542"


def test_one_rank_joins_nobody(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    start_processes(torch.device("cpu"), 1.0)
    assert not dist.is_initialized()
    stop_processes()


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    for key, value in {"WORLD_SIZE": "4", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(UserError, match=r"4 ranks on a machine of 2 GPU\(s\)"):
        start_processes(torch.device("cuda"), 1.0)


def test_several_machines_that_share_torchruns_store_are_told_how_not_to(monkeypatch, caplog):
    def meet() -> str:
        monkeypatch.setattr(dist, "init_process_group", lambda *_, **more: joined.append(more))
        start_processes(torch.device("cpu"), 1.0)
        said, _ = caplog.text, caplog.clear()
        assert list(joined.pop()) == ["timeout"]
        return said

    joined = []
    environment = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "GROUP_WORLD_SIZE": "2"}
    sharing = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "3"}
    for key, value in (environment | sharing | {"OMP_NUM_THREADS": "1"}).items():
        monkeypatch.setenv(key, value)
    assert "start torchrun with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in meet()
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    assert meet() == ""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert meet() == ""


def raised(action) -> BaseException:
    with pytest.raises(BaseException) as caught:
        action()
    return caught.value


def test_a_broken_connection_is_an_echo_also_where_another_error_wraps_it():
    def wrapped():
        try:
            raise RuntimeError(CLOSED)
        except RuntimeError as error:
            raise ValueError("cannot save") from error

    assert failure_of(RuntimeError(CLOSED), 0)[0].kind is Kind.ECHO
    assert failure_of(dist.DistBackendError("NCCL error"), 0)[0].kind is Kind.ECHO
    assert failure_of(raised(wrapped), 0)[0].kind is Kind.ECHO
    assert failure_of(RuntimeError("the shapes differ"), 0)[0].kind is Kind.ERROR


def test_a_broken_connection_in_a_clean_up_does_not_hide_the_error():
    def run():
        try:
            raise UserError("step 7: the loss is nan")
        finally:
            raise RuntimeError(CLOSED)

    failure, meant = failure_of(raised(run), 3)
    assert (failure.kind, failure.message, failure.status) == (Kind.MISTAKE, "step 7: the loss is nan", 2)
    assert isinstance(meant, UserError)


@dataclass
class Process:
    exitcode: int
    error_file_data: dict[str, Any] = field(default_factory=dict)


def said(rank: int, kind: Kind, message: str, time: float, **more: str) -> Process:
    failure = Failure(rank, kind, message, time=time, **more)
    return Process(1, {"failure": json.loads(json.dumps(asdict(failure)))})


def test_the_first_rank_by_time_is_named_and_no_echo():
    ended = {
        0: said(0, Kind.ECHO, "RuntimeError: closed", 1.0),
        1: said(1, Kind.ERROR, "ValueError: second", 3.0),
        2: said(2, Kind.MISTAKE, "step 7: the loss is nan", 2.0),
        3: Process(-15),
    }
    assert verdict(ended, 4) == ("rank 2: step 7: the loss is nan", 2)


def test_echoes_alone_name_the_first():
    ended = {1: said(1, Kind.ECHO, "closed", 2.0), 0: said(0, Kind.ECHO, "reset", 1.0)}
    assert verdict(ended, 3) == ("rank 0: reset", 1)


def test_a_rank_that_ended_without_words_is_the_cause():
    echo = said(0, Kind.ECHO, "closed", 1.0)
    assert verdict({2: Process(-11), 0: echo}, 3) == ("rank 2 was killed by signal 11 (SIGSEGV)", 1)
    assert verdict({2: Process(3), 0: echo}, 3) == ("rank 2 ended with status 3 and left no word", 1)


def test_a_hang_names_the_few_before_the_many():
    places = ["all_reduce (a.py:1)", "read (b.py:2)", "all_reduce (a.py:1)"]
    ended = {
        rank: said(rank, Kind.HANG, "no progress for 9 s: in …", 1.0 + rank, since="step 4", place=place)
        for rank, place in enumerate(places)
    }
    assert verdict(ended, 3) == (
        "no progress for 9 s: rank 1 in read (b.py:2) since step 4; "
        "ranks 0, 2 in all_reduce (a.py:1) since step 4",
        1,
    )


def test_a_rank_alone_that_hangs_says_where_and_not_while_it_progresses(tmp_path):
    code = (
        "import time\n"
        "from pathlib import Path\n"
        "from plait.parallel.watchdog import Watchdog\n"
        f"with Watchdog(1.0, Path({str(tmp_path / 'log')!r})) as watchdog:\n"
        "    for step in range(15):\n"
        "        time.sleep(0.1)\n"
        "        watchdog.beat(f'step {step}')\n"
        "    time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert line == "plait: error: no progress for 1 s: in <module> (<string>:8) since step 14"
    assert 'File "<string>", line 8, in <module>' in (tmp_path / "log").read_text()

"""Tokenizing in several processes: the same bytes, and an end to all of them whatever happens."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from plait.data import encoding
from plait.data.build import Progress, build
from plait.data.documents import Document
from plait.data.tokenizer import Tokenizer
from plait.errors import UserError

PLAIT = "import sys\nfrom plait.launch.cli import main\nif __name__ == '__main__': main()\n"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def processes(pid: int | None = None) -> list[psutil.Process]:
    """Those that this one, or another, has started to tokenize."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            found += [child] if "import serve" in " ".join(child.cmdline()) else []
    return found


@pytest.mark.parametrize("kind", ["tokenizer", "hf_tokenizer"])
def test_any_number_of_processes_writes_the_same_bytes(
    tmp_path: Path, texts: list[str], kind: str, request, monkeypatch
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    monkeypatch.setattr(encoding, "BATCH_DOCUMENTS", 7)
    documents = [Document(text, "# prompt\n" * (i % 3)) for i, text in enumerate(texts)]
    written = []
    for workers in (1, 2, 3):
        build(tmp_path / str(workers), documents, tokenizer, mask="prompt", workers=workers)
        written.append(contents(tmp_path / str(workers)))
    assert written[0] == written[1] == written[2]
    assert processes() == []


def test_no_more_than_some_batches_are_read_ahead(texts, tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(encoding, "BATCH_DOCUMENTS", 1)
    read = 0

    def documents() -> Iterator[str]:
        nonlocal read
        for text in texts:
            read += 1
            yield text

    encoder = encoding.Encoder(tokenizer, encoding.np.uint16)
    batches = encoding.encode_documents(documents(), encoder, workers=2)
    for taken, _ in zip(range(1, 40), batches, strict=False):
        assert read <= taken + 2 * encoding.BATCHES_AHEAD + 1
    batches.close()
    assert processes() == []


def test_a_process_that_dies_ends_the_build_in_one_line(
    tmp_path: Path, texts, tokenizer, monkeypatch
) -> None:
    monkeypatch.setattr(encoding, "BATCH_DOCUMENTS", 7)

    def kill(progress: Progress) -> None:
        for process in processes()[:1]:
            process.kill()

    with pytest.raises(UserError, match=r"a process that tokenizes died \(killed by SIGKILL\)"):
        build(tmp_path / "c", texts, tokenizer, workers=2, report=kill)
    assert processes() == []
    assert list(tmp_path.iterdir()) == []


def test_a_failure_in_a_process_is_the_failure_here(tmp_path: Path, texts) -> None:
    with pytest.raises(RuntimeError, match="no tokens today"):
        build(tmp_path / "c", texts, Failing(), workers=2)
    assert list(tmp_path.iterdir()) == []


class Failing(Tokenizer):
    kind = "sentencepiece"
    folder = ""
    vocab_size = 300
    end_of_document = 1

    def __init__(self, *_: object) -> None:
        super().__init__({}, Path("none"))

    def encode_batch(self, texts, num_threads=None):
        raise RuntimeError("no tokens today")

    def decode(self, ids) -> str:
        return ""

    def piece(self, token) -> str:
        return ""


@pytest.mark.parametrize(
    "death",
    [
        signal.SIGTERM,
        *(pytest.param(death, marks=pytest.mark.long) for death in (signal.SIGINT, signal.SIGKILL)),
    ],
)
def test_a_build_that_is_ended_leaves_no_process_and_no_corpus(
    tmp_path: Path, texts: list[str], tokenizer: Tokenizer, death: signal.Signals
) -> None:
    (tmp_path / "plait.py").write_text(PLAIT)
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts * 2000))
    words = ["data", "build", "out/c", "--corpus", "x.jsonl", "--tokenizer", tokenizer.path, "--workers", "2"]
    # A group of its own, which the signal reaches as a terminal's Ctrl-C does.
    build = subprocess.Popen(
        [sys.executable, tmp_path / "plait.py", *words],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
        # A shell's background job ignores Ctrl-C, and hands that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    children = wait_for(lambda: at_work(build.pid))
    if death is signal.SIGKILL:
        build.kill()
    else:
        os.killpg(build.pid, death)
    assert build.stderr
    said = build.stderr.read()
    assert build.wait(20) != 0
    assert wait_for(lambda: not any(alive(child) for child in children))
    assert "Traceback" not in said
    assert not (tmp_path / "out" / "c").exists()
    if death is signal.SIGINT:
        assert not (tmp_path / "out").exists()


def at_work(pid: int) -> list[psutil.Process]:
    """The two processes, once they have tokenized something."""
    children = processes(pid)
    busy = len(children) == 2 and all(sum(child.cpu_times()[:2]) > 0.7 for child in children)
    return children if busy else []


def alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def wait_for(condition):
    deadline = time.monotonic() + 40
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError("it did not happen")

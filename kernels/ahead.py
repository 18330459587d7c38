"""Many kernels compiled at once, by processes of their own."""

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass

from .compiling import Compilation, Usage, compile_for

__all__ = ["Compiled", "compile_all"]


@dataclass(frozen=True)
class Compiled:
    """What came of one: a usage, or the compiler's complaint."""

    place: int
    """In the list that was given."""
    usage: Usage | None
    error: str
    seconds: float


_todo: Sequence[tuple[Compilation, str]] = ()


def compile_all(
    todo: Sequence[tuple[Compilation, str]], processes: int, niceness: int = 10
) -> Iterator[Compiled]:
    """Compile each for its architecture, and give what came of it as it comes.

    Raises:
        BrokenProcessPool: a process died.
    """
    global _todo
    _todo = todo
    if processes < 2:
        yield from map(_compile, range(len(todo)))
        return
    # Forked, they find the kernels already imported; torch has no threads in them that work.
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(processes, context, _begin, (niceness,))
    try:
        for one in as_completed([pool.submit(_compile, place) for place in range(len(todo))]):
            yield one.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(niceness: int) -> None:
    # What ends a run ends its processes by this signal, which one that trains hears only politely.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.nice(niceness)


def _compile(place: int) -> Compiled:
    begin = time.perf_counter()
    compilation, arch = _todo[place]
    try:
        usage, error = compile_for(compilation, arch), ""
    except Exception as complaint:
        usage, error = None, _cause(complaint)
    return Compiled(place, usage, error, time.perf_counter() - begin)


def _cause(complaint: BaseException) -> str:
    """One line: what the compiler said of the innermost function."""
    while complaint.__cause__ is not None:
        complaint = complaint.__cause__
    lines = [line.strip(" ^") for line in str(complaint).splitlines() if line.strip(" ^")]
    return f"{type(complaint).__name__}: {lines[-1][:200] if lines else ''}"

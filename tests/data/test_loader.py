import gc
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from plait.data.loader import Loader
from plait.data.plan import Plan, open_blend
from plait.data.window import batch


@pytest.fixture
def opened(write_shards):
    one, _ = write_shards([[40], [7], [90]], name="one")
    two, _ = write_shards([[200], [3]], name="two")
    sources, shards = open_blend({str(one): 2, str(two): 1})
    return Plan.start(sources, seed=5, seq_len=8), shards


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "plait-loader"]


def test_batches_follow_the_plan_and_resume_anywhere(opened) -> None:
    plan, shards = opened
    with Loader(plan, shards, cursor=0, batch_size=6) as loader:
        batches = [loader.next()[0] for _ in range(5)]
        assert loader.cursor == 30
    for step, arrays in enumerate(batches):
        expected = batch(plan, shards, range(6 * step, 6 * step + 6))
        assert all(np.array_equal(arrays[name], expected[name]) for name in expected)
    # Another batch size from the same cursor reads the same samples.
    with Loader(plan, shards, cursor=12, batch_size=9) as loader:
        rows = np.concatenate([loader.next()[0]["tokens"] for _ in range(2)])
    assert np.array_equal(rows, np.concatenate([b["tokens"] for b in batches])[12:30])


def test_ranks_share_a_batch(opened) -> None:
    plan, shards = opened
    whole = batch(plan, shards, range(6, 12))["tokens"]
    parts = []
    for rank in range(3):
        with Loader(plan, shards, cursor=6, batch_size=6, rows=slice(2 * rank, 2 * rank + 2)) as loader:
            parts.append(loader.next()[0]["tokens"])
            assert loader.cursor == 12
    assert np.array_equal(np.concatenate(parts), whole)
    with pytest.raises(ValueError, match="none"):
        Loader(plan, shards, cursor=0, batch_size=6, rows=slice(6, 8))


def test_isolation_is_passed_on(opened) -> None:
    plan, shards = opened
    with Loader(plan, shards, cursor=0, batch_size=4, isolate_documents=False) as loader:
        assert not loader.next()[0]["document_ids"].any()


def test_failure_reaches_the_caller_after_the_good_batches(opened) -> None:
    plan, shards = opened
    shard = shards[next(iter(shards))]
    calls = 0

    class Failing:
        masked = False

        def tokens(self, start: int, length: int):
            nonlocal calls
            calls += 1
            if calls > 8:
                raise OSError("disk gone")
            return shard.tokens(start, length)

        def starts(self, start: int, length: int):
            return shard.starts(start, length)

    failing = dict.fromkeys(shards, Failing())
    short = Plan.start([plan.stages[0].sources[0]], seed=0, seq_len=8)
    with Loader(short, failing, cursor=0, batch_size=4) as loader:  # pyright: ignore[reportArgumentType]
        loader.next()
        loader.next()
        for _ in range(2):
            with pytest.raises(OSError, match="disk gone"):
                loader.next()
        assert loader.cursor == 8


def test_closing_is_prompt_final_and_repeatable(opened) -> None:
    plan, shards = opened
    loader = Loader(plan, shards, cursor=0, batch_size=4)
    loader.next()
    began = time.perf_counter()
    loader.close()
    assert time.perf_counter() - began < 2
    assert loader_threads() == []
    loader.close()
    with pytest.raises(RuntimeError, match="closed"):
        loader.next()


def test_dropped_loader_ends_its_thread(opened) -> None:
    plan, shards = opened
    loader = Loader(plan, shards, cursor=0, batch_size=4)
    loader.next()
    del loader
    gc.collect()
    assert loader_threads() == []


def test_python_exits_with_a_loader_left_open() -> None:
    script = (
        "import numpy as np\n"
        "from plait.data.loader import Loader\n"
        "from plait.data.mixture import Source\n"
        "from plait.data.plan import Plan\n"
        "class Zeros:\n"
        "    masked = False\n"
        "    def tokens(self, start, length): return np.zeros(length, np.int64)\n"
        "    def starts(self, start, length): return np.zeros(length, bool)\n"
        "plan = Plan.start([Source('s', 1, 1000, 'c')], seed=0, seq_len=8)\n"
        "loader = Loader(plan, {'s': Zeros()}, cursor=0, batch_size=4)\n"
        "print(loader.next()[0]['tokens'].shape)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert (result.returncode, result.stdout, result.stderr) == (0, "(4, 8)\n", "")

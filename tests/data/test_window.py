import numpy as np
import pytest

from plait.data.plan import Plan, open_blend
from plait.data.window import IGNORE, batch, window

DOCUMENTS = [[5], [3, 4, 2], [], [1], [1], [7, 6], [30], [2]]
LENGTHS = [5, 9, 1, 1, 13, 30, 2]
SEQ_LEN = 8


@pytest.fixture
def opened(write_shards):
    prefix, stream = write_shards(DOCUMENTS)
    sources, shards = open_blend({str(prefix): 1})
    return Plan.start(sources, seed=5, seq_len=SEQ_LEN), shards, stream


def test_every_array_of_every_window(opened) -> None:
    plan, shards, stream = opened
    document_of = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    for index in range(40):
        start = plan.sample(index).token
        arrays = window(plan, shards, index)
        documents = document_of[start : start + SEQ_LEN + 1]
        assert np.array_equal(arrays["tokens"], stream[start : start + SEQ_LEN])
        for i in range(SEQ_LEN):
            same = documents[i] == documents[i + 1]
            assert arrays["targets"][i] == (stream[start + i + 1] if same else IGNORE)
            assert arrays["document_ids"][i] == len(set(documents[: i + 1])) - 1
            assert arrays["positions"][i] == i - list(documents).index(documents[i])
        dtypes = [arrays[name].dtype for name in ("tokens", "targets", "document_ids", "positions")]
        assert dtypes == [np.int64, np.int64, np.int32, np.int32]


def test_without_isolation_the_window_is_one_document(opened) -> None:
    plan, shards, stream = opened
    start = plan.sample(3).token
    arrays = window(plan, shards, 3, isolate_documents=False)
    assert np.array_equal(arrays["targets"], stream[start + 1 : start + SEQ_LEN + 1])
    assert arrays["document_ids"].tolist() == [0] * SEQ_LEN
    assert arrays["positions"].tolist() == list(range(SEQ_LEN))


def test_batch_stacks_windows(opened) -> None:
    plan, shards, _ = opened
    arrays = batch(plan, shards, [4, 2, 9])
    assert {name: a.shape for name, a in arrays.items()} == dict.fromkeys(arrays, (3, SEQ_LEN))
    for row, index in enumerate((4, 2, 9)):
        assert np.array_equal(arrays["targets"][row], window(plan, shards, index)["targets"])


def test_batch_across_a_change_of_length_is_refused(opened) -> None:
    plan, shards, _ = opened
    sources = list(plan.stages[0].sources)
    later = plan.append(sources, first_sample=2, seed=0, seq_len=4)
    with pytest.raises(ValueError, match="shape"):
        batch(later, shards, [1, 2])

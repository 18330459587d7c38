"""Parquet, compressed lines, saved datasets, the hub, and folders that mix them."""

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plait.data import rows
from plait.data.corpus import Corpus
from plait.data.documents import Document, Keys
from plait.errors import UserError

TEXTS = ["one\nline", "zwei é", "  \U0001f600\n\n", "vier" * 400]
PROMPTS = Keys(mask="prompt")


def lines(key: str = "text") -> bytes:
    return "\n".join(json.dumps({key: text}) for text in TEXTS).encode()


def refused(source: Path | str, match: str, keys: Keys | str = "text") -> None:
    with pytest.raises(UserError, match=match) as error:
        list(Corpus([str(source)], keys))
    assert str(error.value).startswith(str(source))


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress), ("zst", zstandard.compress)],
)
def test_compressed_lines_and_texts(tmp_path: Path, suffix: str, compress: Callable) -> None:
    path = tmp_path / f"x.jsonl.{suffix}"
    # Parallel compressors write several frames, one after the other.
    path.write_bytes(compress(lines() + b"\n") + compress(lines()))
    assert list(Corpus([str(path)])) == TEXTS + TEXTS
    text = tmp_path / f"y.txt.{suffix}"
    text.write_bytes(compress(b"a\r\nb\rc\n"))
    assert list(Corpus([str(text)])) == ["a\nb\nc\n"]
    whole = path.read_bytes()
    for size in (len(whole) - 1, len(whole) // 4):
        path.write_bytes(whole[:size])
        refused(path, "cannot be read: .*is it whole")
    path.write_bytes(b"not compressed at all")
    refused(path, "cannot be read")


def test_zstd_gives_back_every_size(tmp_path: Path) -> None:
    texts = ["x" * n + os.urandom(n).hex() for n in (0, 1, 4095, 4096, 200_000)]
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(b"".join(zstandard.compress(json.dumps({"text": t}).encode() + b"\n") for t in texts))
    assert list(Corpus([str(path)])) == texts[1:]


def test_parquet_reads_the_column_across_row_groups(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(rows, "BATCH_ROWS", 3)
    path = tmp_path / "x.parquet"
    table = pa.table({"body": pa.array(TEXTS * 3, pa.large_string()), "n": list(range(12))})
    pq.write_table(table, path, row_group_size=5)
    assert list(Corpus([str(path)], "body")) == TEXTS * 3
    refused(path, r"no key 'text' among its keys \('body', 'n'\); name the right one with --text-key")
    refused(path, "row 1: 'n' is 0, not a string", "n")
    refused(path, r"neither 'prompt' and 'completion' nor 'text' .*--prompt-key", PROMPTS)
    pq.write_table(pa.table({"text": ["a", None]}), path)
    refused(path, "row 2: 'text' is null, not a string")
    whole = path.read_bytes()
    for cut in (b"", whole[:100], whole[:-1], whole[100:]):
        path.write_bytes(cut)
        refused(path, "cannot be read as Parquet: .*[^.]; is it whole")


def test_saved_datasets(tmp_path: Path) -> None:
    one, other = (datasets.Dataset.from_dict({"text": [t + n for t in TEXTS]}) for n in "12")
    one.save_to_disk(tmp_path / "one")
    assert list(Corpus([str(tmp_path / "one")])) == [t + "1" for t in TEXTS]
    datasets.DatasetDict({"train": one, "test": other}).save_to_disk(tmp_path / "dict")
    assert list(Corpus([str(tmp_path / "dict")])) == [t + "1" for t in TEXTS]
    assert list(Corpus([str(tmp_path / "dict" / "test")])) == [t + "2" for t in TEXTS]
    datasets.DatasetDict({"a": one, "b": other}).save_to_disk(tmp_path / "ab")
    refused(tmp_path / "ab", "holds the splits a, b; name the folder of one")
    refused(tmp_path / "one", "no key 'body' among its keys", "body")
    (tmp_path / "one" / "state.json").write_text("{}")
    refused(tmp_path / "one", "cannot be read as a saved dataset")


def test_a_folder_of_every_kind_in_the_order_of_paths(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress(b'{"text": "zst"}'))
    datasets.Dataset.from_dict({"text": ["saved"]}).save_to_disk(tmp_path / "c")
    pq.write_table(pa.table({"text": ["parquet"]}), tmp_path / "sub" / "d.parquet")
    (tmp_path / "sub" / "e.parquet.gz").write_bytes(b"of no kind")
    (tmp_path / "settings.json").write_text("{}")
    corpus = Corpus([str(tmp_path)])
    assert list(corpus) == ["text", "zst", "saved", "parquet"]
    assert corpus.description == [f"{tmp_path} (4 files)"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "dataset"])
def test_prompts_and_completions(tmp_path: Path, kind: str) -> None:
    pairs = [{"prompt": "p1 ", "completion": "c1"}, {"prompt": "", "completion": "c2"}]
    path = tmp_path / f"x.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, pairs)) + '\n{"text": "plain"}')
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(pairs), path)
    else:
        datasets.Dataset.from_list(pairs).save_to_disk(path)
    expected = [Document("c1", "p1 "), Document("c2")] + [Document("plain")] * (kind == "jsonl")
    for keys in (Keys(), PROMPTS):
        assert list(Corpus([str(path)], keys).documents()) == expected
    assert next(iter(Corpus([str(path)]))) == "p1 c1"


def test_the_mask_decides_between_text_and_prompt(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "t", "prompt": "p", "completion": "c"}\n')
    assert list(Corpus([str(path)]).documents()) == [Document("t")]
    assert list(Corpus([str(path)], PROMPTS).documents()) == [Document("c", "p")]
    renamed = Keys(prompt="q", completion="a")
    path.write_text('{"q": "p", "a": "c"}\n{"q": "p"}\n')
    documents = Corpus([str(path)], renamed).documents()
    assert next(documents) == Document("c", "p")
    with pytest.raises(UserError, match=r"x.jsonl:2: no key 'text'"):
        next(documents)
    path.write_text('{"prompt": null, "completion": "c"}\n')
    refused(path, ":1: 'prompt' is null, not a string")


VALUES = st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=9), st.lists, max_leaves=6)
ODD_LINES = st.one_of(
    st.dictionaries(st.sampled_from(["text", "prompt", "completion", "x"]), VALUES).map(
        lambda row: json.dumps(row).encode()
    ),
    st.binary(max_size=60),
    st.sampled_from(
        [b'{"text": "a' + b"\\ud800" * 3 + b'"}', b'{"\\ud800": 1}', b"[" * 100_000, b"9" * 9999]
    ),
    st.sampled_from(
        [b'{"text": "x"}', b'{"text": "\xff"}', b'\xef\xbb\xbf{"text": "x"}', b'{"text": [[[[[]]]]]}']
    ),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(st.lists(ODD_LINES, max_size=4), st.sampled_from([Keys(), PROMPTS]))
def test_any_lines_give_texts_or_one_line(tmp_path: Path, found: list[bytes], keys: Keys) -> None:
    path = tmp_path / "fuzz.jsonl"
    path.write_bytes(b"\n".join(found))
    said = str(path)
    tracemalloc.start()
    try:
        for text in Corpus([str(path)], keys):
            text.encode()
    except UserError as error:
        said = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert said.startswith(str(path))
    assert len(said.encode()) < len(str(path)) + 500
    assert peak < 20e6


def test_a_hub_out_of_reach_is_said_at_once() -> None:
    script = "import sys\nfrom plait.launch.cli import main\nsys.argv[1:] = sys.argv[1].split()\nmain()\n"
    command = "data tokenizer x.model --corpus hub:some/name --vocab-size 300"
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    began = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-c", script, command], env=environment, capture_output=True, text=True, timeout=60
    )
    assert time.perf_counter() - began < 20
    assert result.returncode == 2
    assert result.stderr.startswith("plait: error: hub:some/name: the hub did not give this dataset (")
    assert result.stderr.count("\n") == 1
    with pytest.raises(UserError, match=r"offline mode is enabled.* check name, token and network"):
        Corpus(["hub:some/name"])


def test_a_split_of_the_hub_is_streamed(monkeypatch) -> None:
    asked = []

    def load_dataset(*arguments: object, **options: object):
        asked.append((arguments, options))
        return datasets.Dataset.from_dict({"text": TEXTS, "n": [1, 2, 3, 4]}).to_iterable_dataset()

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(Corpus(["hub:some/name:en@validation"])) == TEXTS
    assert list(Corpus(["hub:some/name"])) == TEXTS
    assert asked == [
        (("some/name", "en"), {"split": "validation", "streaming": True}),
        (("some/name", None), {"split": "train", "streaming": True}),
    ]
    refused("hub:some/name", r"no key 'body' among its keys \('text', 'n'\)", "body")


def test_a_path_that_may_be_meant_for_the_hub() -> None:
    with pytest.raises(UserError, match=r"no such file or folder \(a dataset of the hub is hub:some/name\)"):
        Corpus(["some/name"])

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from plait.data.corpus import Corpus
from plait.errors import UserError


def test_stdlib_is_code_without_tests_and_always_the_same() -> None:
    corpus = Corpus(["stdlib"])
    files = corpus.files["stdlib"]
    parts = {part for file in files for part in file.parts}
    assert not parts & {"test", "tests", "site-packages", "dist-packages", "__pycache__", "idle_test"}
    assert {"argparse.py", "decoder.py"} <= {file.name for file in files}
    documents = list(corpus)
    assert documents == list(Corpus(["stdlib"]))
    assert sum(map(len, documents)) > 5_000_000


def test_folder_in_order_by_suffix(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "one.md").write_text("one")
    (tmp_path / "a.txt").write_text("first\nline")
    (tmp_path / "c.jsonl").write_text('{"text": "two"}\n\n{"text": ""}\n{"text": "three"}')
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    assert list(Corpus([str(tmp_path)])) == ["first\nline", "one", "two", "three"]


def test_explicit_file_of_any_suffix_and_odd_names(tmp_path: Path) -> None:
    odd = tmp_path / "we[i]rd *#?.log"
    odd.write_text("x\u2028y", encoding="utf-8")
    assert list(Corpus([str(odd)])) == ["x\u2028y"]


def test_jsonl_keeps_text_exactly(tmp_path: Path) -> None:
    texts = ["a\u2028b\x85c\x0b", 'tab\tquote"', "  \n\n  ", "\U0001f600", "é" * 70_000]
    path = tmp_path / "x.jsonl"
    path.write_text(
        "\ufeff"
        + "\n".join(json.dumps({"body": t, "n": i}, ensure_ascii=i % 2 == 0) for i, t in enumerate(texts))
    )
    assert list(Corpus([str(path)], "body")) == texts


def test_jsonl_compressed_and_with_half_surrogates(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a\\ud800b"}\n{"text": "\\ud83d\\ude00"}\n'))
    assert list(Corpus([str(path)])) == ["a\ufffdb", "\U0001f600"]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('{"text": "cut', "cut"),
        ('{"content": "x", "id": 3}', "'content', 'id'"),
        ('["text"]', '["text"]'),
        ('{"text": null}', "null"),
        ('{"text": 5}', "5"),
        ("{}", "none"),
    ],
)
def test_bad_jsonl_line_is_named(tmp_path: Path, line: str, found: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(UserError) as error:
        list(Corpus([str(path)]))
    assert f"{path}:2: " in str(error.value)
    assert found in str(error.value)


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no corpus"):
        Corpus([])
    with pytest.raises(UserError, match=r"missing.txt: no such file"):
        Corpus([str(tmp_path / "missing.txt")])
    with pytest.raises(UserError, match=r"no \*.txt"):
        Corpus([str(tmp_path)])
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match="holds no text"):
        list(Corpus([str(tmp_path)]))
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin.txt: not UTF-8"):
        list(Corpus([str(tmp_path / "latin.txt")]))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 1000)[:30])
    with pytest.raises(UserError, match=r"cut.jsonl.gz: cannot be read"):
        list(Corpus([str(tmp_path / "cut.jsonl.gz")]))


def test_reading_is_silent_and_touches_neither_network_nor_cache(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.jsonl").write_text('{"text": "json"}\n')
    script = (
        "import sys\n"
        "def watch(event, arguments):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo'): print(event, arguments)\n"
        "sys.addaudithook(watch)\n"
        "from plait.data.corpus import Corpus\n"
        "assert list(Corpus(sys.argv[1:])) == ['text', 'json']\n"
    )
    home = tmp_path / "home"
    home.mkdir()
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")],
        env={"PATH": os.environ["PATH"], "HOME": str(home), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert list(home.rglob("*")) == []

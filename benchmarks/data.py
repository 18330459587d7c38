"""Text to shards, shards to batches, and 2000 shards to a first batch, against the usual ways.

    python benchmarks/data.py [--megabytes 48] [--turns 3] [--cores 1 2] [--tokenizer DIR_OR_MODEL …]

All forms read the same JSONL and use the same tokenizer; megatron-core's is the loop of its
preprocessing tool around its own builder, `datasets` maps and keeps Arrow. plait also shuffles
documents, holds some out, counts and checksums. Each number of cores is a process bound to so many.
Prints Markdown tables.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from timing import Times, machine, take_turns

from plait.data.build import build
from plait.data.corpus import Corpus
from plait.data.loader import Loader
from plait.data.manifest import read_manifest
from plait.data.megatron import indexed_dataset
from plait.data.plan import Plan, open_blend
from plait.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

SEQ_LEN = 4096
BATCH = 64
SHARDS = 2000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=48)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--cores", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument(
        "--tokenizer", nargs="*", default=[], help="a file or folder; by default two are made"
    )
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        os.sched_setaffinity(0, range(args.cores[0]))
        for row in build_rows(args.inside, args.cores[0], args.turns):
            print(f"| {' | '.join(row)} |", flush=True)
        return
    with tempfile.TemporaryDirectory(prefix="plait-benchmark-") as name:
        folder = Path(name)
        prepare(folder, args.megabytes, args.tokenizer)
        print(machine("megatron-core", "datasets", "tokenizers", "sentencepiece"))
        size = (folder / "text.jsonl").stat().st_size / 1e6
        print(f"\nJSONL of {size:.0f} MB to shards, medians of {args.turns} turns\n", flush=True)
        print("| tokenizer | cores | form | seconds | MB/s | plait is faster by |")
        print("|---|---|---|---|---|---|", flush=True)
        for cores in args.cores:
            options = ["--inside", name, "--cores", str(cores), "--turns", str(args.turns)]
            subprocess.run([sys.executable, __file__, *options], check=True)
        print("\n| shards | first batch after | threads | samples/s | tokens/s |\n|---|---|---|---|---|")
        for row in loader_rows(folder):
            print(f"| {' | '.join(row)} |", flush=True)


def prepare(folder: Path, megabytes: int, named: list[str]) -> None:
    """The text and the tokenizers: files of the standard library, again and again."""
    texts = list(Corpus(["stdlib"]))
    with (folder / "text.jsonl").open("w", encoding="utf-8") as file:
        for i in range(10**9):
            file.write(json.dumps({"text": texts[i % len(texts)]}) + "\n")
            if file.tell() > megabytes * 1e6:
                break
    for i, path in enumerate(named):
        (folder / f"tokenizer-{i}").mkdir()
        load_tokenizer(path).save_into(folder / f"tokenizer-{i}")
    if not named:
        for kind in ("sentencepiece", "huggingface"):
            (folder / f"tokenizer-{kind}").mkdir()
        train_tokenizer(texts, folder / "tokenizer-sentencepiece/tokenizer.model", vocab_size=32000)
        byte_level_bpe(texts, folder / "tokenizer-huggingface")


def byte_level_bpe(texts: list[str], folder: Path) -> None:
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=32000, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator(texts, trainer)
    trained.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))


def build_rows(folder: Path, cores: int, turns: int) -> Iterator[list[str]]:
    """For each tokenizer, the three ways on so many cores."""
    size = (folder / "text.jsonl").stat().st_size
    for path in sorted(folder.glob("tokenizer-*")):
        tokenizer = load_tokenizer(path)
        forms: dict[str, Callable[[], int]] = {
            "plait": partial(with_plait, folder, tokenizer, cores),
            "megatron-core": partial(with_megatron, folder, tokenizer, cores),
            "datasets": partial(with_datasets, folder, tokenizer, cores),
        }
        counts = {name: run() for name, run in forms.items()}
        assert len(set(counts.values())) == 1, f"not the same tokens: {counts}"
        times = take_turns(forms, turns, warmup=0)
        for name in forms:
            ratio = "" if name == "plait" else f"{times['plait'].times_faster_than(times[name]):.2f}x"
            yield [tokenizer.kind, str(cores), name, *speed(times[name], size), ratio]


def speed(times: Times, size: int) -> list[str]:
    return [f"{times.median:.2f}", f"{size / 1e6 / times.median:.1f}"]


def with_plait(folder: Path, tokenizer: Tokenizer, cores: int) -> int:
    documents = Corpus([str(folder / "text.jsonl")])
    build(folder / "plait", documents, tokenizer, workers=cores)
    manifest = read_manifest(folder / "plait")
    shutil.rmtree(folder / "plait")
    assert manifest is not None
    return sum(split.tokens for split in manifest.splits.values())


def with_megatron(folder: Path, tokenizer: Tokenizer, cores: int) -> int:
    """Lines to a pool of processes, as the tool has it, or one after the other here."""
    global encoder
    encoder = tokenizer
    out, tokens = folder / "megatron", 0
    indexed = indexed_dataset()
    builder = indexed.IndexedDatasetBuilder(f"{out}.bin", dtype=np.uint16)
    with (folder / "text.jsonl").open(encoding="utf-8") as lines:
        pool = multiprocessing.get_context("fork").Pool(cores) if cores > 1 else None
        for ids in pool.imap(encode_line, lines, 32) if pool else map(encode_line, lines):
            builder.add_document(np.array(ids), [len(ids)])
            tokens += len(ids)
        if pool:
            pool.terminate()
    builder.finalize(f"{out}.idx")
    return tokens


encoder: Tokenizer


def encode_line(line: str) -> list[int]:
    return [*encoder.encode(json.loads(line)["text"]), encoder.end_of_document]


def with_datasets(folder: Path, tokenizer: Tokenizer, cores: int) -> int:
    def encode(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        encoded = tokenizer.encode_batch(rows["text"], num_threads=1)
        return {"ids": [[*ids, tokenizer.end_of_document] for ids in encoded]}

    datasets.disable_progress_bars()
    cache = str(folder / "cache")
    rows = datasets.load_dataset(
        "json", data_files=str(folder / "text.jsonl"), split="train", cache_dir=cache
    )
    mapped = rows.map(
        encode,
        batched=True,
        batch_size=256,
        remove_columns=["text"],
        num_proc=cores,
        load_from_cache_file=False,
    )
    tables: Any = mapped.with_format("arrow").iter(1000)
    tokens = sum(len(table["ids"].combine_chunks().flatten()) for table in tables)
    del rows, mapped
    shutil.rmtree(cache)
    return tokens


def loader_rows(folder: Path) -> Iterator[list[str]]:
    """Windows of 4096 tokens out of one shard and out of many, each thread's share read ahead."""
    many = [write_shard(folder / f"shard-{i}", i) for i in range(SHARDS)]
    indexed_dataset()
    for prefixes in (many[:1], many):
        for workers in (1, 4):
            began = time.perf_counter()
            sources, shards = open_blend({prefix: 1.0 + i % 3 for i, prefix in enumerate(prefixes)})
            plan = Plan.start(sources, seed=0, seq_len=SEQ_LEN)
            with Loader(plan, shards, cursor=0, batch_size=BATCH, workers=workers) as loader:
                loader.next()
                first = time.perf_counter() - began
                batches, began = 0, time.perf_counter()
                while time.perf_counter() - began < 5:
                    loader.next()
                    batches += 1
                rate = batches * BATCH / (time.perf_counter() - began)
            row = [f"{len(prefixes)}", f"{first:.2f} s", f"{workers}", f"{rate:.0f}"]
            yield [*row, f"{rate * SEQ_LEN / 1e6:.1f} M"]


def write_shard(prefix: Path, seed: int) -> str:
    """A shard of 100 documents with 65536 tokens together."""
    rng = np.random.default_rng(seed)
    builder = indexed_dataset().IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for tokens in np.array_split(rng.integers(0, 32000, 2**16), np.sort(rng.integers(1, 2**16, 99))):
        builder.add_document(tokens, [len(tokens)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


if __name__ == "__main__":
    main()

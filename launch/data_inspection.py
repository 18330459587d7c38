"""What `plait data inspect` prints: counts, lengths and text of shards."""

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..data.build import SPLITS
from ..data.manifest import Manifest
from ..data.shards import Shard
from ..data.tokenizer import Tokenizer, find_tokenizer, load_tokenizer
from ..errors import UserError

BAR_WIDTH = 40
SHOWN_TOKENS = 160


def show(corpus: str, samples: int) -> None:
    """Print a corpus folder, or the shards of a prefix.

    Raises:
        UserError: nothing such is there, or it is damaged.
    """
    console = Console(highlight=False)
    shards = _open(corpus)
    first = next(iter(shards.values()))
    tokenizer = _tokenizer(first)
    console.print(_counts(shards))
    if first.manifest:
        console.print(_facts(first.manifest, tokenizer))
    for name, shard in shards.items():
        console.print(f"\n[bold]{name}[/bold]: documents by tokens")
        console.print(_histogram(shard))
    if samples:
        name = next(iter(shards))
        console.print(f"\n[bold]{name}[/bold]: the first {min(samples, first.num_documents)} documents")
    for document in range(min(samples, first.num_documents)):
        _print_document(console, first, tokenizer, document)


def _open(corpus: str) -> dict[str, Shard]:
    folder = Path(corpus)
    if not folder.is_dir():
        prefix = corpus.removesuffix(".bin").removesuffix(".idx")
        return {Path(prefix).name: Shard(prefix)}
    prefixes = [folder / name for name in SPLITS if (folder / f"{name}.idx").exists()]
    prefixes = prefixes or sorted(path.with_suffix("") for path in folder.glob("*.idx"))
    if not prefixes:
        raise UserError(f"{corpus}: no .idx file lies in this folder; name a folder of `plait data build`")
    return {prefix.name: Shard(prefix) for prefix in prefixes}


def _counts(shards: dict[str, Shard]) -> Table:
    table = Table("shards", "documents", "tokens", "tokens a document", "dtype", "MB on disk")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, shard in shards.items():
        size = shard.bin.stat().st_size + shard.idx.stat().st_size
        mean = shard.num_tokens / shard.num_documents
        table.add_row(
            name,
            f"{shard.num_documents:,}",
            f"{shard.num_tokens:,}",
            f"{mean:,.0f}",
            shard.layout.dtype.name,
            f"{size / 1e6:.1f}",
        )
    return table


def _facts(manifest: Manifest, tokenizer: Tokenizer | None) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_row("corpus", "; ".join(manifest.corpus))
    kind = f"{tokenizer.kind}, " if tokenizer else ""
    table.add_row("tokenizer", f"{kind}{manifest.vocab_size} ids, sha256 {manifest.tokenizer_sha256[:16]}…")
    table.add_row("end of document", f"id {manifest.end_of_document}")
    table.add_row("bytes a token", f"{manifest.bytes_per_token:.3f}")
    table.add_row("unigram entropy", f"{manifest.unigram_entropy:.4f} nats a token")
    table.add_row("seed", str(manifest.seed))
    for name, split in manifest.splits.items():
        if split.mask:
            table.add_row(f"targets of {name}", f"{split.mask.counted_tokens:,} tokens; the rest is masked")
    return table


def _histogram(shard: Shard) -> Table:
    """One row a power of two of the documents' lengths."""
    counts = np.zeros(65, dtype=np.int64)
    for lengths in shard.document_lengths():
        buckets = np.where(lengths > 0, np.frexp(lengths.astype(np.float64))[1], 0)
        counts += np.bincount(buckets, minlength=len(counts))
    filled = np.flatnonzero(counts)
    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right")
    table.add_column(justify="right")
    for bucket in range(filled[0], filled[-1] + 1):
        low, high = (1 << bucket) >> 1, max(0, (1 << bucket) - 1)
        bar = "█" * round(BAR_WIDTH * counts[bucket] / counts.max())
        table.add_row(f"{low:,} to {high:,}" if high > low else f"{low:,}", f"{counts[bucket]:,}", bar)
    return table


def _tokenizer(shard: Shard) -> Tokenizer | None:
    found = find_tokenizer(Path(shard.prefix).parent) if shard.manifest else None
    return load_tokenizer(found) if found else None


def _print_document(console: Console, shard: Shard, tokenizer: Tokenizer | None, document: int) -> None:
    begin, end = shard.document_start(document), shard.document_start(document + 1)
    console.print(f"[dim]document {document}, {end - begin:,} tokens[/dim]")
    if end == begin:
        return
    tokens, _ = shard.read(begin, min(SHOWN_TOKENS, end - begin))
    shown = tokenizer.decode(tokens.tolist()) if tokenizer else " ".join(map(str, tokens.tolist()))
    console.print(Text(shown.rstrip("\n") + (" …" if len(tokens) < end - begin else "")))

"""The shapes that a config's kernels see on one rank: what `plait bench warm` compiles for."""

from ..kernels.compiling import Shape
from .config import Config

__all__ = ["operators_of", "shape_of"]

_OF_LETTER = {
    "M": ("ssd", "convolution", "normalization"),
    "-": ("activation",),
    "E": ("activation", "experts"),
    "*": (),
}
"""The operators with kernels of their own that a letter of the pattern needs, beside norms and the loss."""


def shape_of(config: Config, name: str) -> Shape:
    """What a rank holds; sizes of layers that the model does not have are those of a small one."""
    model, parallel, train = config.model, config.parallel, config.train
    rows = train.batch_size // (parallel.dp_replicate * parallel.dp_shard)
    mamba, attention, moe = model.mamba, model.attention, model.moe
    hidden = moe.d_expert if moe else (model.mlp.d_ff if model.mlp else 16)
    sizes = {"H": 1, "P": 16, "G": 1, "N": 16, "Q": 64}
    if mamba:
        sizes = {
            "H": mamba.num_heads,
            "P": mamba.head_dim,
            "G": mamba.num_groups,
            "N": mamba.d_state,
            "Q": mamba.chunk_size,
            "d_conv": mamba.d_conv,
        }
    shape = Shape(
        model=name,
        B=min(rows, train.micro_batch_size or rows),
        L=config.data.seq_len // parallel.sp,
        D=model.d_model,
        V=model.vocab_size,
        F=hidden,
        E=moe.num_experts if moe else 0,
        K=moe.top_k if moe else 0,
        attention=(attention.num_heads, attention.num_kv_heads, attention.head_dim)
        if attention
        else (0, 0, 0),
        **sizes,
    )
    return shape.on(parallel.tp)


def operators_of(config: Config) -> tuple[str, ...]:
    """Those that the pattern's letters need."""
    found = ["normalization", "cross_entropy"]
    for letter in dict.fromkeys(config.model.layers):
        found += _OF_LETTER[letter]
    return tuple(dict.fromkeys(found))

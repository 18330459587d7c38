"""Draws the pictures of docs/parallelism.md: how a token, a state and a gradient travel.

python docs/drawings/parallelism.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

FOLDER = Path(__file__).parent

INK, FAINT, BACK = "#1d2733", "#8a94a0", "#ffffff"
SHARDS = ("#4c8bd6", "#e59a3c", "#58a77c", "#b06bb5")
"""A color for each place on sp; its tints are places on tp."""
PALE = ("#bcd5f2", "#f7dab3", "#c3e2d1", "#e3c9e5")
MESSAGE = "#c2374a"
"""Whatever goes from rank to rank."""
SHARED = "#cfd4da"


def main() -> None:
    for name, draw in {"token": token, "state": state, "gradient": gradient}.items():
        figure = draw()
        figure.savefig(FOLDER / f"{name}.png", dpi=130, facecolor=BACK, metadata={"Software": None})
        plt.close(figure)


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """Axes whose unit is a tenth of an inch, y downwards."""
    figure = plt.figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width * 10)
    axes.set_ylim(height * 10, 0)
    axes.axis("off")
    return figure, axes


def box(
    axes: Axes, x: float, y: float, w: float, h: float, fill: str, text: str = "", **style: object
) -> None:
    hatch = "////" if style.pop("padding", False) else None
    edge = FAINT if hatch else BACK
    axes.add_patch(Rectangle((x, y), w, h, facecolor=fill, edgecolor=edge, hatch=hatch, linewidth=1.2))
    label(axes, x + w / 2, y + h / 2, text, **{"ha": "center", **style})


def label(axes: Axes, x: float, y: float, text: str, **style: object) -> None:
    axes.text(x, y, text, **{"va": "center", "fontsize": 9, "color": INK, **style})  # type: ignore[arg-type]


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], **style: object) -> None:
    options = {"arrowstyle": "-|>", "mutation_scale": 11, "linewidth": 1.4, "color": MESSAGE, **style}
    axes.add_patch(FancyArrowPatch(start, end, shrinkA=0, shrinkB=0, **options))  # type: ignore[arg-type]


def token() -> Figure:
    """250 tokens on sp 2 x tp 2: a shard is 126, so that tp can halve it, and two are padding."""
    figure, axes = canvas(9.6, 6.7)
    left, per_token = 19.0, 70 / 252
    at = lambda t: left + t * per_token  # noqa: E731

    def row(y: float, name: str, note: str) -> None:
        label(axes, 1.5, y - 0.9, name, fontweight="bold")
        label(axes, 1.5, y + 1.1, note, fontsize=7.5, color=FAINT)

    row(5, "the window", "250 tokens, and 2 of padding")
    box(axes, at(0), 3, 250 * per_token, 4, SHARED, "tokens 0..249")
    box(axes, at(250), 3, 2 * per_token, 4, BACK, padding=True)

    row(15, "the residual stream", "cut over sp, then tp")
    for part in range(4):
        sp, tp = divmod(part, 2)
        color = (SHARDS, PALE)[tp][sp]
        box(axes, at(63 * part), 13, 63 * per_token, 4, color, f"sp {sp}, tp {tp}\n63 tokens", fontsize=8)
        arrow(axes, (at(63 * part + 31), 7.3), (at(63 * part + 31), 12.7), color=FAINT, linewidth=1)
    axes.text(
        at(2),
        10,
        "each rank looks up its rows of the vocabulary; a scatter over tp adds them",
        fontsize=7.5,
        color=INK,
        va="center",
        backgroundcolor=BACK,
    )

    row(27, "entering a mixer", "norm, then gather over tp")
    row(38.5, "the mixer", "tp cuts heads and channels")
    for sp in range(2):
        first, width = at(126 * sp), 126 * per_token
        for tp in range(2):
            color = (SHARDS, PALE)[tp][sp]
            box(
                axes,
                first,
                24.5 + 3 * tp,
                width,
                3,
                color,
                f"rank (sp {sp}, tp {tp}): all 126 tokens",
                fontsize=8,
            )
            box(axes, first + 0.6, 36 + 3 * tp, width - 1.2, 3, color, f"heads of tp {tp}", fontsize=8)
        middle = at(126 * sp + 63)
        for side in (-1, 1):
            arrow(axes, (middle + side * 9, 17.3), (middle - side * 7, 24.2), linewidth=1.1)
            arrow(axes, (middle + side * 9, 17.3), (middle + side * 9, 24.2), linewidth=1.1)
    label(axes, at(126), 20.7, "gather", color=MESSAGE, ha="center", fontsize=8.5, backgroundcolor=BACK)
    cut = at(126)
    for y, text, way in (
        (43.9, "M: halo (3 tokens) and state, forwards only", "-|>"),
        (46.7, "*: keys and values of all; half the queries traded", "<|-|>"),
    ):
        arrow(axes, (cut - 5, y), (cut + 5, y), arrowstyle=way)
        label(axes, cut + 6, y, text, fontsize=8, color=MESSAGE)
    label(axes, cut - 6, 45.3, "over sp, inside the mixer", fontsize=8, color=MESSAGE, ha="right")

    row(59, "leaving it", "scatter over tp adds the heads")
    for part in range(4):
        sp, tp = divmod(part, 2)
        color = (SHARDS, PALE)[tp][sp]
        text = f"sp {sp}, tp {tp}\n+ residual"
        box(axes, at(63 * part), 57, 63 * per_token, 4, color, text, fontsize=8)
        middle = at(126 * sp + 63)
        for side in (-1, 1):
            arrow(axes, (middle + side * 9, 49.4), (at(63 * part + 31), 56.7), linewidth=1.1)
    label(axes, at(126), 52.8, "scatter", color=MESSAGE, ha="center", fontsize=8.5, backgroundcolor=BACK)
    label(
        axes,
        left,
        64.3,
        "Norms and routers see the tokens of the stream, and experts' ranks get them from there.",
        fontsize=8,
        color=INK,
    )
    return figure


def state() -> Figure:
    figure, axes = canvas(9.6, 7.75)
    label(axes, 2, 3, "A shard does to the state that enters it   h  →  exp(a) h + F", fontweight="bold")
    label(
        axes,
        2,
        6,
        "Two shards, one after the other:   (a₁, F₁) ∘ (a₂, F₂)  =  (a₁ + a₂,  exp(a₂) F₁ + F₂).   "
        "A document that starts inside has a = −∞.",
        fontsize=8.5,
    )
    label(
        axes,
        2,
        8.7,
        "What enters shard r is the state of shards 0 … r−1 together. The gradient goes the same "
        "way in reverse: of shards r+1 … R−1.",
        fontsize=8.5,
    )
    for index, (name, note) in enumerate(
        (
            ("ring", "R − 1 hops, S bytes a rank"),
            ("gather", "one all-gather, (R − 1)(S + a)"),
            ("scan", "⌈log₂ R⌉ rounds, at most that many (S + a)"),
        )
    ):
        left = 3 + 31 * index
        label(axes, left, 13, name, fontweight="bold", fontsize=10)
        label(axes, left, 15.4, note, fontsize=7.5, color=FAINT)
        _exchange(axes, left, name)
    _timeline(axes, 50)
    return figure


def _exchange(axes: Axes, left: float, name: str) -> None:
    x = [left + 3.2 + 6.6 * place for place in range(4)]
    top, step = 18.0, 6.3
    for place in range(4):
        box(axes, x[place] - 2.7, top, 5.4, 3.2, SHARDS[place], f"shard {place}", fontsize=7.5)
    lines = {"ring": 4, "gather": 2, "scan": 3}[name]
    for place in range(4):
        axes.plot([x[place]] * 2, [top + 3.4, top + 3.4 + step * (lines - 1) + 4], color=SHARED, zorder=0)
    y = top + 5.4

    def known(place: int, at: float, text: str) -> None:
        label(
            axes,
            x[place],
            at,
            text,
            ha="center",
            fontsize=7.5,
            bbox={"facecolor": BACK, "edgecolor": SHARED, "pad": 1.6},
        )

    if name == "ring":
        for hop in range(3):
            arrow(axes, (x[hop], y + step * hop), (x[hop + 1], y + step * hop + 3.4))
            known(hop + 1, y + step * hop + 4.6, "0" if hop == 0 else f"0..{hop}")
    elif name == "gather":
        for start in range(4):
            for end in range(4):
                if start != end:
                    arrow(axes, (x[start], y), (x[end], y + 7), linewidth=0.9, mutation_scale=8)
        for place in range(1, 4):
            known(place, y + 9, "0" if place == 1 else f"0..{place - 1}")
    else:
        for place in range(3):
            arrow(axes, (x[place], y), (x[place + 1], y + 4.2))
        for place in range(1, 4):
            known(place, y + 5.8, f"{place - 1}")
        for place in range(2):
            arrow(axes, (x[place], y + 7.4), (x[place + 2], y + 12.2))
        for place, text in ((2, "0..1"), (3, "0..2")):
            known(place, y + 13.8, text)
    if name == "gather":
        note = "in the frames: the shards before one's own, as far as they are known"
        label(axes, left + 16, 45, note, ha="center", fontsize=7.5, color=FAINT)


def _timeline(axes: Axes, top: float) -> None:
    label(axes, 2, top, "What hides them: one rank, one M layer, forward", fontweight="bold")
    work = (
        ("dt, x, b\nprojections", 15, "#dfe5ec"),
        ("convolve\nx, b", 9, "#dfe5ec"),
        ("states of\nchunks", 11, "#dfe5ec"),
        ("z, c projections;\nconvolve c", 18, "#dfe5ec"),
        ("outputs of\nchunks", 12, "#dfe5ec"),
        ("norm,\nout", 8, "#dfe5ec"),
    )
    label(axes, 2, top + 6.5, "computes", fontsize=8.5)
    label(axes, 2, top + 12.3, "sends", fontsize=8.5)
    x, starts = 12.0, []
    for text, width, color in work:
        box(axes, x, top + 4, width, 5, color, text, fontsize=7.5)
        starts.append(x)
        x += width
    for first, last, text in ((0, 1, "halo"), (3, 4, "state: a, F")):
        box(
            axes,
            starts[first],
            top + 11,
            starts[last] - starts[first],
            2.6,
            MESSAGE,
            text,
            fontsize=8,
            color=BACK,
        )
        for at, below in ((first, "launched"), (last, "waited for")):
            axes.plot([starts[at]] * 2, [top + 4, top + 15], color=MESSAGE, linewidth=1)
            label(axes, starts[at], top + 16.2, below, ha="center", fontsize=7.5, color=MESSAGE)
    label(
        axes,
        2,
        top + 20.2,
        "The outputs add the entering state in place: exp(Aₜ) Cₜ h, to what each chunk makes of its "
        "own tokens. Nothing passes over the outputs a second time.",
        fontsize=8,
    )
    label(
        axes,
        2,
        top + 23,
        "The backward: the state's gradient leaves with the outputs' backward, and is waited for after "
        "that of z and c. The halo's gradient goes back one rank and is",
        fontsize=8,
    )
    label(
        axes,
        2,
        top + 25.4,
        "added at its last tokens. A layer that is computed again finds the state and the halo kept: "
        "neither is sent twice.",
        fontsize=8,
    )


def gradient() -> Figure:
    """Two ranks of dp_shard x sp and two of tp; W is cut over tp, n is the same on its every rank."""
    figure, axes = canvas(9.6, 7.35)
    left, wide, pitch = 26.0, 12.0, 17.5
    x = [left + pitch * rank for rank in range(4)]
    for rank in range(4):
        fsdp, tp = divmod(rank, 2)
        label(axes, x[rank] + wide / 2, 2.2, f"shard {fsdp}, tp {tp}", ha="center", fontweight="bold")

    def row(y: float, name: str, *notes: str) -> None:
        label(axes, 1.5, y, name, fontweight="bold")
        for line, note in enumerate(notes):
            label(axes, 1.5, y + 2.3 + 1.9 * line, note, fontsize=7.5, color=FAINT)

    row(
        6,
        "1  a layer's backward",
        "every exchange in reverse:",
        "gather ↔ scatter, states from",
        "the shards after, halo back",
    )
    for rank in range(4):
        tp = rank % 2
        box(
            axes,
            x[rank],
            5,
            wide,
            6,
            (SHARDS[0], SHARDS[1])[tp],
            f"W, part {tp}:\nits tokens' share",
            fontsize=8,
        )
        box(axes, x[rank], 11.2, wide, 3, SHARED, "n: its share", fontsize=8)

    row(
        21.5,
        "2  sum over dp_shard x sp",
        "reduce-scatter, fp32: each keeps",
        "its rows of the sum;",
        "over dp_replicate then all-reduce",
    )
    for rank in range(4):
        for other in (rank, (rank + 2) % 4):
            arrow(axes, (x[rank] + wide / 2, 14.6), (x[other] + wide / 2, 21.6), linewidth=1.1)
    for rank in range(4):
        fsdp, tp = divmod(rank, 2)
        box(axes, x[rank], 22 + 3 * fsdp, wide, 3, SHARDS[tp], "Σ W: half its rows", fontsize=8)
        axes.add_patch(
            Rectangle((x[rank], 22), wide, 6, fill=False, edgecolor=FAINT, linestyle=":", linewidth=1)
        )
        box(axes, x[rank], 28.4 + 1.9 * fsdp, wide, 1.9, SHARED, "Σ n", fontsize=7)
        axes.add_patch(
            Rectangle((x[rank], 28.4), wide, 3.8, fill=False, edgecolor=FAINT, linestyle=":", linewidth=1)
        )

    row(
        37.5,
        "3  sum over tp",
        "all-reduce, once a step, of what",
        "each rank of tp holds: norms,",
        "routers, shared b and c",
    )
    for pair in (0, 2):
        arrow(axes, (x[pair] + wide, 38.6), (x[pair + 1], 38.6), arrowstyle="<|-|>")
    for rank in range(4):
        fsdp = rank // 2
        arrow(axes, (x[rank] + wide / 2, 32.4), (x[rank] + wide / 2, 36.3), color=FAINT, linewidth=1)
        box(axes, x[rank], 36.7 + 1.9 * fsdp, wide, 1.9, SHARED, "ΣΣ n", fontsize=7)
        axes.add_patch(
            Rectangle((x[rank], 36.7), wide, 3.8, fill=False, edgecolor=FAINT, linestyle=":", linewidth=1)
        )

    row(
        48.5,
        "4  one norm",
        "squares of what each holds, n",
        "on tp 0 only; summed over",
        "dp_shard x sp and tp",
    )
    for rank in range(4):
        arrow(axes, (x[rank] + wide / 2, 40.8), (x[rank] + wide / 2, 47.6), linewidth=1.1)
        text = "|W|² + |n|²" if rank % 2 == 0 else "|W|²"
        label(axes, x[rank] + wide / 2, 44, text, ha="center", fontsize=8, backgroundcolor=BACK)
    box(
        axes,
        x[0],
        48,
        x[3] + wide - x[0],
        4.4,
        PALE[3],
        "the gradient's norm: the same number on every rank, and in every layout",
        fontsize=8.5,
    )

    row(61, "5  the step", "clip by that number;", "AdamW on what a rank holds")
    for rank in range(4):
        fsdp, tp = divmod(rank, 2)
        arrow(axes, (x[rank] + wide / 2, 52.7), (x[rank] + wide / 2, 59.6), color=FAINT, linewidth=1)
        box(axes, x[rank], 60, wide, 3.4, SHARDS[tp], "W, m, v: half its rows", fontsize=7.5)
        box(axes, x[rank], 63.5, wide, 2.2, SHARED, "n, m, v", fontsize=7)
    label(
        axes,
        1.5,
        71.5,
        "W stands for all that tp cuts, n for what it does not. The loss was divided by the step's global "
        "counts before the backward, so every red arrow is a sum.",
        fontsize=8,
    )
    return figure


if __name__ == "__main__":
    main()

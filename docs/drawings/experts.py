"""Draws the picture of docs/parallelism.md of a token's way to its experts and back.

python docs/drawings/experts.py
"""

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from parallelism import BACK, FAINT, FOLDER, MESSAGE, PALE, SHARDS, SHARED, arrow, box, canvas, label

CHOICES = ((0, 1, 1, 2, 3, 5), (0, 0, 2, 4, 4, 6), (1, 3, 3, 5, 6, 6), (0, 2, 4, 4, 7, 7))
"""Of eight experts, each rank's, sorted; a rank of ep has two of them."""

LEFT, PITCH, CELL = 19.0, 18.2, 2.6


def main() -> None:
    figure = experts()
    figure.savefig(FOLDER / "experts.png", dpi=130, facecolor=BACK, metadata={"Software": None})
    plt.close(figure)


def experts() -> Figure:
    """Four ranks, sp 2 x tp 2, are ep 4: a cell is a token's choice, its color the rank of its expert above
    and the rank it comes from below."""
    figure, axes = canvas(9.6, 6.6)

    def row(y: float, name: str, *notes: str) -> None:
        label(axes, 1.5, y, name, fontweight="bold")
        for line, note in enumerate(notes):
            label(axes, 1.5, y + 2.1 + 1.8 * line, note, fontsize=7.5, color=FAINT)

    for rank in range(4):
        sp, tp = divmod(rank, 2)
        text = f"sp {sp}, tp {tp} = ep {rank}"
        label(axes, LEFT + PITCH * rank + 8, 2.4, text, ha="center", fontweight="bold")

    row(7, "the stream", "each rank's tokens")
    row(15.5, "by expert", "2 choices a token;", "color: the expert's rank")
    sent: dict[tuple[int, int], list[float]] = {}
    for rank, choices in enumerate(CHOICES):
        start = LEFT + PITCH * rank
        box(axes, start, 5.2, CELL * 6, 3.4, SHARED, "3 tokens", fontsize=8)
        arrow(axes, (start + 8, 8.9), (start + 8, 13.3), color=FAINT, linewidth=1)
        for place, expert in enumerate(choices):
            x = start + CELL * place
            box(axes, x, 13.6, CELL, 3.8, SHARDS[expert // 2], f"e{expert}", fontsize=7.5)
            sent.setdefault((expert // 2, rank), []).append(x + CELL / 2)

    row(31.5, "at their experts", "all-to-all, then sorted;", "color: the rank they", "come from")
    for rank in range(4):
        arrivals = [
            (expert, source)
            for expert in (2 * rank, 2 * rank + 1)
            for source, choices in enumerate(CHOICES)
            for one in choices
            if one == expert
        ]
        start = LEFT + PITCH * rank
        for place, (_, source) in enumerate(arrivals):
            box(axes, start + 2.2 * place, 29.6, 2.2, 3.8, PALE[source], str(source), fontsize=7.5)
        x = start
        for expert in (2 * rank, 2 * rank + 1):
            width = 2.2 * sum(one == expert for one, _ in arrivals)
            box(axes, x, 33.6, width, 2.6, SHARDS[rank], f"e{expert}", fontsize=7.5)
            x += width
        for source in range(4):
            for at in sent.get((rank, source), ())[:1]:
                arrow(axes, (at, 17.7), (start + 7, 29.2), linewidth=0.9, color=SHARDS[rank])
    _timeline(axes, 42)
    return figure


def _timeline(axes: Axes, top: float) -> None:
    label(axes, 1.5, top, "What hides the messages: one rank, one E layer, forward", fontweight="bold")
    work = (
        ("router", 9),
        ("latent in", 10),
        ("shared expert:\nup", 16),
        ("sort, experts, sort", 19),
        ("shared expert:\ndown", 14),
        ("weighted\nsum", 9),
    )
    label(axes, 1.5, top + 6.5, "computes", fontsize=8.5)
    label(axes, 1.5, top + 12.3, "sends", fontsize=8.5)
    x, starts = 12.0, []
    for text, width in work:
        box(axes, x, top + 4, width, 5, "#dfe5ec", text, fontsize=7.5)
        starts.append(x)
        x += width
    for first, text in ((1, "counts"), (2, "tokens out"), (4, "outputs back")):
        width = starts[first + 1] - starts[first]
        box(axes, starts[first], top + 11, width, 2.6, MESSAGE, text, fontsize=8, color=BACK)
    label(
        axes,
        1.5,
        top + 18.2,
        "The backward sends the gradients of the outputs out and those of the tokens back, behind the "
        "same two halves of the shared expert.",
        fontsize=8,
    )


if __name__ == "__main__":
    main()

"""Lines over powers of two as an SVG, with nothing but text: a GPU machine need not have matplotlib."""

import math
from collections.abc import Mapping, Sequence
from html import escape

__all__ = ["lines"]

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 420, 70, 210, 40, 50
COLOURS = ("#0b62a4", "#d1495b", "#2e8b57", "#8a5a9e", "#c98b1b", "#5f6b73", "#111111")


def lines(title: str, x_name: str, y_name: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """A drawing of positive points on logarithmic axes."""
    xs = [math.log2(x) for points in series.values() for x, _ in points]
    ys = [math.log10(y) for points in series.values() for _, y in points]
    if not xs:
        return f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}"></svg>\n'
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
    y_low, y_high = math.floor(min(ys)), math.ceil(max(max(ys), min(ys) + 0.1))

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low)
        up = (y - y_low) / (y_high - y_low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        _text(LEFT, 22, title, size=15),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, x_name, anchor="middle"),
        _text(LEFT, TOP - 6, y_name),
    ]
    for power in range(y_low, y_high + 1):
        (left, y), (right, _) = at(x_low, power), at(x_high, power)
        parts.append(f'<line x1="{left}" y1="{y}" x2="{right}" y2="{y}" stroke="#ddd"/>')
        parts.append(_text(LEFT - 6, y + 4, f"{10.0**power:g}", anchor="end"))
    for power in range(math.ceil(x_low), math.floor(x_high) + 1):
        x, y = at(power, y_low)
        size = 2**power
        parts.append(_text(x, y + 18, f"{size // 1024} K" if size >= 1024 else str(size), anchor="middle"))
    for number, (name, points) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        places = [at(math.log2(x), math.log10(y)) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
        y = TOP + 18 * number
        parts.append(f'<rect x="{WIDTH - RIGHT + 12}" y="{y}" width="12" height="4" fill="{colour}"/>')
        parts.append(_text(WIDTH - RIGHT + 30, y + 6, name))
    return "\n".join([*parts, "</svg>", ""])


def _text(x: float, y: float, words: str, *, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(words)}</text>'

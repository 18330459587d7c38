"""Bytes, counts and times as people read them."""

__all__ = ["readable_age", "readable_count", "readable_size", "readable_time"]


def readable_size(count: float) -> str:
    """Three digits and a unit, such as 1.23 MB."""
    if count < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB", "GB", "TB"):
        count /= 1000
        # What rounds to 1000 is one of the next unit.
        if count < 999.5 or unit == "TB":
            break
    return f"{count:,.{2 if count < 9.995 else 1 if count < 99.95 else 0}f} {unit}"


def readable_count(number: float) -> str:
    """A count in short, such as 1.2k."""
    for scale, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= scale:
            return f"{number / scale:.1f}{suffix}"
    return f"{number:.0f}"


def readable_time(seconds: float) -> str:
    """As a clock shows it: 1:02:03, or 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def readable_age(seconds: float) -> str:
    """How long ago, in its largest unit, such as 3 min."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"

"""Bytes as people read them."""

__all__ = ["readable_size"]


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

"""The one exception that reaches a user as a single line instead of a traceback, and lists in it."""

from collections.abc import Sequence

__all__ = ["UserError", "few"]

LONGEST = 4000
"""Characters of a message; what stands between its beginning and its end is left out."""


class UserError(Exception):
    """A mistake that its maker can mend: a wrong key, a missing file, a tokenizer that does not fit.

    The message is one line that names the key or the file, its value, and the remedy. The `plait`
    command prints it after ``plait: error:`` and exits with status 2. Anything else that escapes is
    a bug in plait and shows its traceback.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(message.split())
        # What a file holds may stand in it: signs that steer a terminal, halves of characters, megabytes.
        if len(line) > LONGEST:
            line = f"{line[: LONGEST // 2]} … {line[-LONGEST // 2 :]}"
        if not line.isprintable():
            line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
        super().__init__(line)


def few(items: Sequence[str], most: int = 3, between: str = ", ") -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return between.join(items[:most]) + more

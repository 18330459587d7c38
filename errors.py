"""The one exception that reaches a user as a single line instead of a traceback, and lists in it."""

from collections.abc import Sequence

__all__ = ["UserError", "few"]


class UserError(Exception):
    """A mistake that its maker can mend: a wrong key, a missing file, a tokenizer that does not fit.

    The message is one line that names the key or the file, its value, and the remedy. The `plait`
    command prints it after ``plait: error:`` and exits with status 2. Anything else that escapes is
    a bug in plait and shows its traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def few(items: Sequence[str], most: int = 3, between: str = ", ") -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return between.join(items[:most]) + more

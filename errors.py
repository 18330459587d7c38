"""The one exception that reaches a user as a single line instead of a traceback."""

__all__ = ["UserError"]


class UserError(Exception):
    """A mistake that its maker can mend: a wrong key, a missing file, a tokenizer that does not fit.

    The message is one line that names the key or the file, its value, and the remedy. The `plait`
    command prints it after ``plait: error:`` and exits with status 2. Anything else that escapes is
    a bug in plait and shows its traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))

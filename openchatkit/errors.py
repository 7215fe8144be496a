"""The error that users see, and the exit statuses of every command."""

DEFECT = 1
USER_ERROR = 2
RESUMABLE = 75


class UserError(Exception):
    """An error that the user or the data causes: what was given, what was expected, what to do next.

    Commands print its message as one line, without a traceback, and end with `exit_status`. `typed` is the message for
    a person at a chat's prompt, who can act on it there.
    """

    exit_status = USER_ERROR

    def __init__(self, message: str, *, typed: str | None = None) -> None:
        super().__init__(message)
        self.typed = message if typed is None else typed


class Interrupted(UserError):
    """Work that was stopped before its end; the same command resumes it."""

    exit_status = RESUMABLE

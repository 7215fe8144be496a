"""The one error a user is meant to see, and the exit statuses of every command."""

DEFECT = 1
USER_ERROR = 2
RESUMABLE = 75


class UserError(Exception):
    """Something the user or the data must change: what was given, what was expected, what to do next.

    Commands print its message as one line, without a traceback, and end with `exit_status`. `typed` is what is said
    instead to a person at a chat's prompt, who can do something about it there.
    """

    exit_status = USER_ERROR

    def __init__(self, message: str, *, typed: str | None = None) -> None:
        super().__init__(message)
        self.typed = message if typed is None else typed


class Interrupted(UserError):
    """Work stopped before its end that the same command resumes as it is."""

    exit_status = RESUMABLE

"""The one error a user is meant to see, and the exit statuses of every command."""

DEFECT = 1
USER_ERROR = 2
RESUMABLE = 75


class UserError(Exception):
    """Something the user or the data must change: what was given, what was expected, what to do next.

    Commands print its message as one line, without a traceback, and end with `exit_status`.
    """

    exit_status = USER_ERROR


class Interrupted(UserError):
    """Work stopped before its end that the same command resumes as it is."""

    exit_status = RESUMABLE

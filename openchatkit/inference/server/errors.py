"""What the server refuses or fails at, in the shape that clients of OpenAI's API know."""

from collections.abc import Mapping

from loguru import logger

from openchatkit.errors import UserError


class ApiError(Exception):
    """An answer that is an error: HTTP `status`, a `message` for people, the `param` at fault, a `code`."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, object]:
        """The JSON of it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        if self.status == 429:
            kind = "rate_limit_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def defect(error: BaseException) -> ApiError:
    """What a client is told of a defect of ours, nothing of the inside; the log gets one line that says where."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = (
        ""
        if trace is None or isinstance(error, UserError)
        else f" ({trace.tb_frame.f_code.co_filename}:{trace.tb_lineno})"
    )
    reason = " ".join(str(error).split())[:300]
    logger.error(f"error: a request failed: {type(error).__name__}: {reason}{place}")
    return ApiError(500, "the server failed at this request; its own log says more", code="internal_error")


def closing() -> ApiError:
    """What a client is told when the server is being stopped."""
    return ApiError(503, "the server is shutting down", code="shutting_down")

"""Errors as clients read them: the object that OpenAI's clients expect, and the one that Anthropic's expect."""

from typing import Any

from m3dist.errors import M3Error

ANTHROPIC_PATHS = ("/v1/messages",)  # and all below

OPENAI_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}
ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}


class BadRequest(M3Error):
    """A request that cannot be answered as it stands; names the field. Never the cluster's fault.

    `param` is the field's path in the body ("messages[2].content"), `code` a word for programs, `status` the HTTP
    status: 400, or 404 where what is named does not exist.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400):
        super().__init__(message)
        self.message, self.param, self.code, self.status = message, param, code, status


def is_anthropic(path: str) -> bool:
    """Whether `path` (of the URL) belongs to Anthropic's API."""
    return any(path == start or path.startswith(start + "/") for start in ANTHROPIC_PATHS)


def body_for(path: str, status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The JSON body of an answer with `status` (400 and up), in the style of the API that `path` belongs to."""
    if is_anthropic(path):
        return {"type": "error", "error": {"type": anthropic_type(status), "message": message}}
    return {"error": {"message": message, "type": openai_type(status), "param": param, "code": code}}


def openai_type(status: int) -> str:
    return OPENAI_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")


def anthropic_type(status: int) -> str:
    return ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")

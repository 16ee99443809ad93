"""What comes in: a request's JSON, strictly read, and one error that names the field where it is not as documented.

JSON as RFC 8259 has it: no NaN or Infinity, no number beyond float64, no half of a surrogate pair. What the standard
library lets through of these breaks later and elsewhere: in a tokenizer, a template, an answer.
"""

import asyncio
import json
import math
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NoReturn

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute

from m3dist.gateway.errors import BadRequest

DEEPEST = 100  # arrays and objects within each other
MOST_COMMAS = 2**21  # in a body: a second's work; a prompt that has more is longer than any context
LARGE = 2**16  # bytes of a body that is read beside the event loop
SHOWN = 100  # characters of a client's own names that an error repeats


def parse(text: bytes | str) -> Any:
    """The value of a JSON text. Raises BadRequest (without a field) where it is none, or one that cannot be used."""
    try:
        text = text.decode() if isinstance(text, bytes) else text
        if text.count(",") > MOST_COMMAS:
            raise BadRequest(f"more than {MOST_COMMAS} commas")
        value = json.loads(text, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        raise BadRequest(f"not JSON: {error.msg} at character {error.pos}") from None
    except UnicodeDecodeError as error:
        raise BadRequest(f"not JSON: byte {error.start} is not UTF-8") from None
    except RecursionError:
        raise BadRequest(f"more than {DEEPEST} arrays and objects within each other") from None
    except ValueError:  # int() of thousands of digits
        raise BadRequest("not JSON: a number with too many digits") from None
    _check(value)
    return value


def parse_object(text: bytes | str) -> dict[str, Any]:
    """The same, for a text that must be an object."""
    value = parse(text)
    if not isinstance(value, dict):
        raise BadRequest("must be a JSON object")
    return value


def _no_number(name: str) -> NoReturn:
    raise BadRequest(f"not JSON: {name} is not a number")


def _check(value: Any) -> None:
    """Raises BadRequest for values that JSON cannot express or that nothing after this can take."""
    level = [value]
    for _ in range(DEEPEST + 1):
        if not level:
            return
        below: list[Any] = []
        for item in level:
            if isinstance(item, str):
                _check_text(item)
            elif isinstance(item, float) and not math.isfinite(item):
                raise BadRequest("not JSON: a number beyond the range of float64")
            elif isinstance(item, list):
                below += item
            elif isinstance(item, dict):
                below += item.keys()
                below += item.values()
        level = below
    raise BadRequest(f"more than {DEEPEST} arrays and objects within each other")


def _check_text(text: str) -> None:
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        half = ord(text[error.start])
        raise BadRequest(f"not Unicode: \\u{half:04x} is one half of a surrogate pair") from None


# ---------------------------------------------------------------------------------------------------------------------
# Routes


class JsonRequest(Request):
    """A request whose JSON is read by `parse_object`."""

    async def json(self) -> Any:
        return self.scope["m3dist.body"]


class JsonRoute(APIRoute):
    """A route that answers a body it cannot use by BadRequest: what is no JSON, and what its model refuses."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            if request.method == "POST":
                request = await _read(request)
            try:
                return await handler(request)
            except RequestValidationError as error:
                raise bad_request(error.errors(), request.scope.get("m3dist.body")) from None

        return strict


async def _read(request: Request) -> JsonRequest:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise BadRequest(f"Content-Type must be application/json, not {kind[:SHOWN]!r}", status=415)
    request = JsonRequest(request.scope, request.receive)
    try:
        body = await request.body()
        parsed = parse_object(body) if len(body) < LARGE else await asyncio.to_thread(parse_object, body)
        request.scope["m3dist.body"] = parsed
    except BadRequest as error:
        raise BadRequest(f"the request's body: {error.message}") from None
    return request


# ---------------------------------------------------------------------------------------------------------------------
# pydantic's errors


def bad_request(errors: Sequence[Any], body: Any) -> BadRequest:
    """One of pydantic's errors: of a field with several allowed types, that of the type that fits furthest."""
    paths = [_path(error, body) for error in errors]
    path = max(
        (path for path in paths if path.startswith(paths[0])), key=lambda path: path.count(".") + path.count("[")
    )
    messages = dict.fromkeys(_message(error) for at, error in zip(paths, errors) if at == path)
    return BadRequest(f"{path or 'the request'} {', or '.join(messages)}", path or None)


def _path(error: Any, body: Any) -> str:
    """'messages[2].content' of the error's location, which also names the alternatives of a union on the way."""
    path, at = "", body
    location = error["loc"][1:]  # after "body"
    for i, step in enumerate(location):
        if isinstance(at, list) and isinstance(step, int) and step < len(at):
            path, at = f"{path}[{step}]", at[step]
        elif isinstance(at, dict) and (step in at or error["type"] == "missing" and i == len(location) - 1):
            path, at = f"{path}.{str(step)[:SHOWN]}".lstrip("."), at.get(step)
    return path


def _message(error: Any) -> str:
    """What follows the field's name."""
    message = str(error["msg"])
    if error["type"] == "missing":
        return "is required"
    if error["type"] == "value_error":  # raised by a validator of ours
        return message.removeprefix("Value error, ")
    if message.startswith("Input should be "):
        return "must be " + message.removeprefix("Input should be ")
    return f"is wrong: {message}"

"""The gateway's HTTP application: the APIs' routers, errors as their clients read them, and what stands around both."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from m3dist.gateway import anthropic_api, health, metrics, openai_api, responses_api
from m3dist.gateway.access import Access
from m3dist.gateway.errors import BadRequest, body_for
from m3dist.gateway.limits import Keys
from m3dist.gateway.prompts import Encoder
from m3dist.gateway.ranks import Busy, Ranks, RequestFailed, Unavailable
from m3dist.options import ServeOptions, is_loopback

ROUTERS = (health.router, metrics.router, openai_api.router, responses_api.router, anthropic_api.router)


@dataclass(frozen=True)
class Services:
    """What the routers work with, as request.app.state.services."""

    ranks: Ranks
    options: ServeOptions
    keys: Keys = field(default_factory=Keys)
    encoder: Encoder = field(default_factory=Encoder)

    @property
    def metrics(self) -> metrics.Metrics:
        return self.ranks.metrics

    @property
    def models(self) -> tuple[str, ...]:
        """The names that clients may call the model by; the first is its own."""
        model = self.options.model
        own = Path(model).name if Path(model).is_absolute() or model.startswith(".") else model.partition("@")[0]
        return tuple(dict.fromkeys((own, *self.options.names)))


def create_app(services: Services, *more: APIRouter) -> FastAPI:
    """The application without what stands around it; with `more` routers beside the APIs'.

    No CORS: pages of other origins cannot read its answers.
    """
    app = FastAPI(title="m3dist", docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.services = services
    for router in (*ROUTERS, *more):
        app.include_router(router)
    for error, answer in ANSWERS.items():
        app.add_exception_handler(error, answer)
    return app


def create_access(services: Services, app: FastAPI) -> Access:
    """The application with all that stands around it, as uvicorn runs it."""
    options = services.options
    local = not services.keys and is_loopback(options.host)
    return Access(app, services.keys, services.metrics, options.request_limit, local)


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def _answer(
    request: Request, status: int, message: str, retry_after: float | None = None, **named: Any
) -> JSONResponse:
    headers = {} if retry_after is None else {"retry-after": str(max(1, round(retry_after)))}
    return JSONResponse(body_for(path_of(request), status, message, **named), status, headers)


def path_of(request: Request) -> str:
    """Not request.url's, which a Host that is none breaks."""
    return request.scope["path"]


async def _bad_request(request: Request, error: Any) -> JSONResponse:
    return _answer(request, error.status, error.message, param=error.param, code=error.code)


async def _invalid(request: Request, error: Any) -> JSONResponse:
    """What a router's schema refuses, unless the router says it better."""
    first = error.errors()[0]
    param = ".".join(str(step) for step in first["loc"][1:])
    return _answer(request, 400, f"{param or 'the request'}: {first['msg']}", param=param or None)


async def _busy(request: Request, error: Any) -> JSONResponse:
    return _answer(request, 429, str(error), error.retry_after, code="queue_full")


async def _unavailable(request: Request, error: Any) -> JSONResponse:
    return _answer(request, 503, str(error), error.retry_after)


async def _failed(request: Request, error: Any) -> JSONResponse:
    return _answer(request, error.status, error.message)


async def _http(request: Request, error: Any) -> JSONResponse:
    """No such path, or method."""
    response = _answer(request, error.status_code, f"{request.method} {path_of(request)}: {error.detail}")
    response.headers.update(error.headers or {})
    return response


async def _internal(request: Request, error: Any) -> JSONResponse:
    """A mistake of ours; access.py logs it."""
    return _answer(request, 500, "internal error")


ANSWERS: dict[Any, Any] = {
    BadRequest: _bad_request,
    RequestValidationError: _invalid,
    Busy: _busy,
    Unavailable: _unavailable,
    RequestFailed: _failed,
    HTTPException: _http,
    Exception: _internal,
}

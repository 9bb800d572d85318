"""The ASGI app: middleware, routes, errors."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

import service
from service.config import Settings
from service.engine.engine import Engine
from service.errors import ServiceError
from service.http.a1111.routes import WebUI
from service.http.bodies import Room
from service.http.checks import PromptCheck, load
from service.http.drawing import Studio
from service.http.images import Generation
from service.http.keys import ApiKeys
from service.http.metrics import Metrics
from service.http.middleware import CLIENT_LEFT, BodyLimit, RequestLog
from service.http.openai import documents
from service.http.openai.models import Models
from service.http.openai.routes import Images
from service.http.operations import Operations
from service.http.page import DOCS, documentation, playground
from service.http.paths import OnePath, path_of, pattern_of
from service.http.problems import answer, problem
from service.plan.served import Served

log = logging.getLogger(__name__)

_BODIES = 4  # of the largest size; the server has room for these
_EVERY = 1.0  # seconds between two checks of the engine
_LATE = 3.0  # seconds; a check this late shows that the whole process stood still

_DESCRIPTION = """Draws and denoises images with a diffusion U-Net.
Rows of all requests in flight share each forward pass; the same seed gives the same bytes."""


def create_app(engine: Engine, served: Served, settings: Settings, metrics: Metrics) -> FastAPI:
    """Make the app. The engine starts and stops with the app."""

    prompts = None
    if settings.check is not None:
        prompts = PromptCheck(load(settings.check), metrics.check_done, settings.max_queue)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        if prompts is not None:
            prompts.start()
        watch = asyncio.create_task(_watch(engine))
        try:
            yield
        finally:
            watch.cancel()
            if prompts is not None:
                prompts.close()
            await asyncio.to_thread(engine.close)

    app = _bare_app(lifespan)
    page = playground()
    studio = Studio(engine, served, settings, prompts)
    operations = Operations(engine, served, settings, metrics)
    routers = [
        Generation(studio).router(),
        Images(studio).router(),
        Models(served.model.name, documents.body(studio.sample_model, served)).router(),
        WebUI(studio).router(),
        operations.router(),
        page.router(),
        documentation(f"{app.title} - Swagger UI", settings.root_path.rstrip("/")).router(),
    ]
    if settings.metrics_port is None:
        routers.append(operations.metrics_router())
    _route(app, routers)

    # The last middleware to be added sees a request first.
    max_body = int(settings.max_body)
    room = Room(_BODIES * max_body, spare=max_body)
    app.add_middleware(BodyLimit, room=room, max_body=max_body, has_keys=bool(settings.api_keys))
    if settings.api_keys:
        open_paths = {"/health", "/health/live", "/health/ready", *page.paths}
        open_paths |= {"/metrics"} if settings.public_metrics else set()
        app.add_middleware(ApiKeys, keys=[key.get_secret_value() for key in settings.api_keys], open_paths=open_paths)
    if settings.cors_origins:
        app.add_middleware(
            _Cors,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],
            expose_headers=[
                "ETag",
                "Retry-After",
                "Server-Timing",
                "X-Clipped",
                "X-Ignored-Fields",
                "X-Request-ID",
                "X-Seed",
                "X-Should-Retry",
                "X-Warnings",
            ],
        )
    _log_all(app, engine, metrics)
    return app


def create_metrics_app(engine: Engine, served: Served, settings: Settings, metrics: Metrics) -> FastAPI:
    """Make the app of METRICS_PORT, which serves only /metrics, without a key."""
    app = _bare_app(openapi_url=None)
    _route(app, [Operations(engine, served, settings, metrics).metrics_router()])
    _log_all(app, engine, metrics)
    return app


class ByPort:
    """Routes the requests of one port to an app of its own."""

    def __init__(self, app: ASGIApp, port: int, app_of_port: ASGIApp) -> None:
        self._app = app
        self._port = port
        self._app_of_port = app_of_port

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_for_port = scope["type"] == "http" and scope["server"][1] == self._port
        await (self._app_of_port if is_for_port else self._app)(scope, receive, send)


def _bare_app(lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]] | None = None, **more: Any) -> FastAPI:
    """An app without routes, whose errors are problem documents.

    FastAPI's redirects between paths with and without a final slash are off, because they repeat the Host header.
    FastAPI's documentation page is off, because the page loads files from other hosts.
    """
    app = FastAPI(
        title="Stepwise",
        version=service.__version__,
        description=_DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        **more,
    )
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientDisconnect, _client_left)
    return app


def _route(app: FastAPI, routers: Iterable[APIRouter]) -> None:
    """Add routes. The app's state keeps the methods of each path, for 405 answers and for the log."""
    methods: dict[str, set[str]] = {path: {"GET", "HEAD"} for path in (app.openapi_url,) if path}
    for router in routers:
        app.include_router(router)
        for route in router.routes:
            assert isinstance(route, APIRoute)
            methods.setdefault(route.path_format, set()).update(route.methods or ())
    app.state.methods = methods


def _log_all(app: FastAPI, engine: Engine, metrics: Metrics) -> None:
    # Page files and unknown paths share the label `other`.
    endpoints = [path for path in app.state.methods if not path.startswith(("/playground/", f"{DOCS}/"))]
    app.add_middleware(
        RequestLog, metrics=metrics, endpoints=endpoints, is_draining=lambda: engine.status == "draining"
    )
    app.add_middleware(OnePath)


class _Cors(CORSMiddleware):
    """Starlette's middleware. Its refusals become problem documents."""

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        headers = {name: value for name, value in response.headers.items() if not name.startswith("content-")}
        return problem(response.status_code, bytes(response.body).decode(), headers=headers)


async def _watch(engine: Engine) -> None:
    """Check the engine every second, whatever happens.

    After a standstill (SIGSTOP, `docker pause`, a moved machine), passes look overdue. They have until the next check
    to end.
    """
    was_late = False
    while True:
        before = time.monotonic()
        await asyncio.sleep(_EVERY)
        was_late = time.monotonic() - before > _LATE and not was_late
        if was_late:
            continue
        try:
            engine.check_health()
        except Exception:
            log.exception("looking after the engine failed; the next look is in %g s", _EVERY)


async def _service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    return answer(error, path_of(request.scope))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.scope["path"]
    detail = {404: f"there is nothing at {path}", 405: f"{path} does not take {request.method}"}.get(
        error.status_code, str(error.detail)
    )
    headers = dict(error.headers or {})
    all_methods = request.app.state.methods
    methods = all_methods.get(path_of(request.scope), all_methods.get(pattern_of(request.scope)))
    if error.status_code == 405 and methods is not None:
        headers["Allow"] = ", ".join(sorted(methods))  # starlette names the methods of only one route
    return problem(error.status_code, detail, path_of(request.scope), headers)


async def _client_left(_: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_LEFT)  # the client left before its whole body arrived

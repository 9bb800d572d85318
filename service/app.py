"""The ASGI app: middleware, routes, errors."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.routing import APIRoute
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

import service
from service.config import Settings
from service.engine import Engine
from service.errors import ServiceError, answer, problem
from service.generation import Generation
from service.metrics import Metrics
from service.middleware import CLIENT_LEFT, ApiKeys, BodyLimit, RequestLog, path_of
from service.operations import Operations
from service.page import Playground
from service.served import Served

log = logging.getLogger(__name__)

_EVERY = 1.0  # seconds, from one look at the engine to the next
_LATE = 3.0  # seconds; a look that comes so late tells that the whole process stood still

_DESCRIPTION = """Draws and denoises images with a diffusion U-Net.
Rows of all requests in flight share each forward pass; the same seed gives the same bytes."""


def create_app(engine: Engine, served: Served, settings: Settings, metrics: Metrics) -> FastAPI:
    """Make the app. The engine starts and stops with it."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        watch = asyncio.create_task(_watch(engine))
        try:
            yield
        finally:
            watch.cancel()
            await asyncio.to_thread(engine.close)

    app = FastAPIOffline(
        title="Stepwise",
        version=service.__version__,
        description=_DESCRIPTION,
        lifespan=lifespan,
        redoc_url=None,
        swagger_ui_parameters={"validatorUrl": None},  # the default asks another host
    )
    methods: dict[str, set[str]] = {}  # of each path
    playground = Playground()
    routers = (
        Generation(engine, served, settings, metrics).router(),
        Operations(engine, served, settings, metrics).router(),
        playground.router(),
    )
    for router in routers:
        app.include_router(router)
        for route in router.routes:
            if isinstance(route, APIRoute):
                methods.setdefault(route.path, set()).update(route.methods or ())
    app.state.methods = methods
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientDisconnect, _client_left)

    # The last one added is the first that a request meets.
    app.add_middleware(BodyLimit, max_body=int(settings.max_body))
    if settings.api_keys:
        open_paths = {"/health", "/health/live", "/health/ready", *playground.paths}
        open_paths |= {"/metrics"} if settings.public_metrics else set()
        app.add_middleware(ApiKeys, keys=[key.get_secret_value() for key in settings.api_keys], open_paths=open_paths)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],
            expose_headers=["ETag", "Retry-After", "Server-Timing", "X-Clipped", "X-Request-ID", "X-Seed"],
        )
    # The files of the playground are not worth a label each: they are `other`, as what is nowhere is.
    endpoints = [path for path in methods if not path.startswith("/playground/")]
    app.add_middleware(RequestLog, metrics=metrics, endpoints=endpoints)
    return app


async def _watch(engine: Engine) -> None:
    """Look after the engine, whatever happens.

    A process that stood still (SIGSTOP, `docker pause`, a machine that was moved) finds its passes overdue when it goes
    on. They get until the next look to end.
    """
    was_late = False
    while True:
        before = time.monotonic()
        await asyncio.sleep(_EVERY)
        was_late = time.monotonic() - before > _LATE and not was_late
        if was_late:
            continue
        try:
            engine.check_pulse()
        except Exception:
            log.exception("looking after the engine failed; the next look is in %g s", _EVERY)


async def _service_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    return answer(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    detail = {
        404: f"there is nothing at {request.url.path}",
        405: f"{request.url.path} does not take {request.method}",
    }.get(error.status_code, str(error.detail))
    headers = dict(error.headers or {})
    methods = request.app.state.methods.get(path_of(request.scope))
    if error.status_code == 405 and methods is not None:
        headers["Allow"] = ", ".join(sorted(methods))  # starlette's own has the methods of one route alone
    return problem(error.status_code, detail, headers)


async def _client_left(_: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_LEFT)  # before its whole body was here

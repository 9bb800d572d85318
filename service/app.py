"""The ASGI app: middleware, routes, errors."""

import asyncio
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
from service.bodies import Room
from service.config import Settings
from service.engine import Engine
from service.errors import ServiceError, answer, problem
from service.generation import Generation
from service.metrics import Metrics
from service.middleware import CLIENT_LEFT, ApiKeys, BodyLimit, RequestLog, path_of
from service.operations import Operations
from service.page import Playground
from service.served import Served

_BODIES = 4  # bodies of the largest size that are held at once, at most

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
    max_body = int(settings.max_body)
    room = Room(_BODIES * max_body, spare=max_body)
    app.add_middleware(BodyLimit, room=room, max_body=max_body, has_keys=bool(settings.api_keys))
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
    while True:
        await asyncio.sleep(1.0)
        engine.check_pulse()


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

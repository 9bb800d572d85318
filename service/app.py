"""The ASGI app: middleware, routes, errors."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

import service
from service.config import Settings
from service.engine import Engine
from service.errors import ServiceError, answer, problem
from service.generation import Generation
from service.metrics import Metrics
from service.middleware import ApiKeys, BodyLimit, RequestLog
from service.operations import Operations
from service.served import Served

log = logging.getLogger(__name__)

_DESCRIPTION = """Draws and denoises images with a diffusion U-Net.
Rows of all requests in flight share each forward pass; the same seed gives the same bytes."""


def create_app(engine: Engine, served: Served, settings: Settings, metrics: Metrics) -> FastAPI:
    """Make the app. The engine starts and stops with it."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPIOffline(
        title="Stepwise",
        version=service.__version__,
        description=_DESCRIPTION,
        root_path=settings.root_path,
        lifespan=lifespan,
        redoc_url=None,
        swagger_ui_parameters={"validatorUrl": None},  # the default asks another host
    )
    app.include_router(Generation(engine, served, settings).router())
    app.include_router(Operations(engine, served, settings, metrics).router())
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected)

    # The last one added is the first that a request meets.
    app.add_middleware(BodyLimit, max_body=int(settings.max_body))
    if settings.api_keys:
        app.add_middleware(ApiKeys, keys=[key.get_secret_value() for key in settings.api_keys])
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],
            expose_headers=["ETag", "Retry-After", "Server-Timing", "X-Clipped", "X-Request-ID", "X-Seed"],
        )
    app.add_middleware(RequestLog, metrics=metrics)
    return app


async def _service_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    return answer(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    detail = {
        404: f"there is nothing at {request.url.path}",
        405: f"{request.url.path} does not take {request.method}",
    }.get(error.status_code, str(error.detail))
    return problem(error.status_code, detail, error.headers)


async def _unexpected(_: Request, error: Exception) -> Response:
    log.error("a request failed unexpectedly", exc_info=error)
    return problem(500, "the server failed; its log says more")

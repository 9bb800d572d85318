"""GET /v1/models: the one model that is served."""

import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.errors import UnknownModel
from service.http.models import shown
from service.http.openai import documents
from service.http.schemas import Schema

_HEADERS = {"Cache-Control": "no-store"}


@dataclass(frozen=True)
class Models:
    """The routes' dependencies.

    Attributes:
        name: of the model.
        schema: of the body of a request to draw.
        since: when the server began to serve it, in seconds since 1970.
    """

    name: str
    schema: Schema
    since: int = field(default_factory=lambda: int(time.time()))

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/v1", tags=["openai"])
        # The name of a model of the hub has a slash, which some clients encode.
        for path, endpoint, described in (
            ("/models", self.listed, documents.models()),
            ("/models/{model:path}", self.one, documents.model(self.name)),
        ):
            router.add_api_route(path, endpoint, methods=["GET"], **described)
            router.add_api_route(path, endpoint, methods=["HEAD"], include_in_schema=False)
        return router

    async def listed(self) -> Response:
        return JSONResponse({"object": "list", "data": [self._model]}, headers=_HEADERS)

    async def one(self, request: Request) -> Response:
        wanted = request.path_params["model"]
        if self.name not in (wanted, unquote(wanted)):
            raise UnknownModel(f"there is no model {shown(unquote(wanted))}; GET /v1/models lists what is served")
        return JSONResponse(self._model, headers=_HEADERS)

    @property
    def _model(self) -> dict[str, Any]:
        """The model. `schema` is not OpenAI's: it describes the requests, as that of Tenstorrent's server."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.since,
            "owned_by": "stepwise",
            "schema": self.schema,
        }

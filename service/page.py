"""The playground: a page at `/`, and what it loads at `/playground/NAME`. Its files are read once."""

import hashlib
from pathlib import Path
from typing import NamedTuple

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from service.answers import matches
from service.middleware import path_of

_FOLDER = Path(__file__).parent / "playground"
_PAGE = "index.html"
_MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


class _File(NamedTuple):
    content: bytes
    media_type: str
    etag: str


def _read(path: Path) -> _File:
    content = path.read_bytes()
    return _File(content, _MEDIA_TYPES[path.suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')


class Playground:
    """Static files, which browsers may keep, but ask about each time: so that a new version is seen at once.

    Attributes:
        paths: where they are.
    """

    def __init__(self) -> None:
        self._files = {
            "/" if path.name == _PAGE else f"/playground/{path.name}": _read(path) for path in sorted(_FOLDER.iterdir())
        }
        self.paths = frozenset(self._files)

    def router(self) -> APIRouter:
        router = APIRouter(include_in_schema=False)
        for path in self._files:
            router.add_api_route(path, self.file, methods=["GET", "HEAD"])
        return router

    async def file(self, request: Request) -> Response:
        file = self._files[path_of(request.scope)]
        headers = {"ETag": file.etag, "Cache-Control": "no-cache"}
        if matches(", ".join(request.headers.getlist("if-none-match")), file.etag):
            return Response(status_code=304, headers=headers)
        return Response(file.content, headers=headers, media_type=file.media_type)

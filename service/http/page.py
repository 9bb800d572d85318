"""Pages: the playground at `/`, the documentation at `/docs`, and what they load. Their files are read once."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import fastapi_offline
from fastapi import APIRouter
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.requests import Request
from starlette.responses import Response

from service.http.paths import path_of
from service.http.responses import matches

DOCS = "/docs"
_PLAYGROUND = Path(__file__).parent / "playground"
_SWAGGER = Path(fastapi_offline.__file__).parent / "static"  # the assets of /docs, which FastAPI loads from elsewhere
_PAGE = "index.html"
_MEDIA_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}


class _File(NamedTuple):
    content: bytes
    media_type: str
    etag: str


def _file(content: bytes, suffix: str) -> _File:
    return _File(content, _MEDIA_TYPES[suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')


class Pages:
    """Static files, which browsers may keep, but ask about each time: so that a new version is seen at once.

    Attributes:
        paths: where they are.
    """

    def __init__(self, files: Mapping[str, _File]) -> None:
        self._files = files
        self.paths = frozenset(files)

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


def playground() -> Pages:
    """The playground: its page at `/`, and what that loads at `/playground/NAME`."""
    files = sorted(_PLAYGROUND.iterdir())
    return Pages(
        {
            "/" if path.name == _PAGE else f"/playground/{path.name}": _file(path.read_bytes(), path.suffix)
            for path in files
        }
    )


def documentation(title: str, root_path: str) -> Pages:
    """Swagger UI: its page at `/docs`, which reads `/openapi.json`, and what it loads at `/docs/NAME`.

    Args:
        title: of the page.
        root_path: what a proxy serves all of this under.
    """
    script, style, icon = "swagger-ui-bundle.js", "swagger-ui.css", "favicon.png"
    page = get_swagger_ui_html(
        openapi_url=f"{root_path}/openapi.json",
        title=title,
        swagger_js_url=f"{root_path}{DOCS}/{script}",
        swagger_css_url=f"{root_path}{DOCS}/{style}",
        swagger_favicon_url=f"{root_path}{DOCS}/{icon}",
        swagger_ui_parameters={"validatorUrl": None},  # the default asks another host
    )
    files = {
        f"{DOCS}/{name}": _file((_SWAGGER / name).read_bytes(), Path(name).suffix) for name in (script, style, icon)
    }
    return Pages({DOCS: _file(bytes(page.body), ".html"), **files})

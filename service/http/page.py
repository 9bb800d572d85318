"""Pages: the playground at `/`, the documentation at `/docs`, and the pages' files."""

import gzip
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from fastapi import APIRouter
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.requests import Request
from starlette.responses import Response

from service.http.paths import path_of
from service.http.responses import matches

DOCS = "/docs"
_PLAYGROUND = Path(__file__).parent / "playground"
_ICON = "/playground/icon.svg"
_SWAGGER = Path(__file__).parent / "swagger"  # FastAPI's own page loads these files from another host
_PAGE = "index.html"
_MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
# RFC 9110, section 12.4.2: a weight of 0 means "not acceptable".
_GZIP = re.compile(r"(?:^|,)\s*gzip\s*(?:;\s*q=(?:1|0\.0*[1-9])[.\d]*\s*)?(?:,|$)", re.IGNORECASE)


class _File(NamedTuple):
    """A file as browsers get it.

    Attributes:
        zipped: the same file, compressed with gzip; None for a file that is never sent compressed.
    """

    content: bytes
    etag: str
    media_type: str
    zipped: "_File | None" = None


def _file(content: bytes, suffix: str, zipped: _File | None = None) -> _File:
    return _File(content, f'"{hashlib.sha256(content).hexdigest()[:32]}"', _MEDIA_TYPES[suffix], zipped)


class Pages:
    """Static files, read once. Browsers keep them, but ask each time, and so see a new version at once.

    Attributes:
        paths: of all files.
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
        headers = {"Cache-Control": "no-cache"}
        if file.zipped is not None:
            headers["Vary"] = "Accept-Encoding"
            if _GZIP.search(", ".join(request.headers.getlist("accept-encoding"))):
                file = file.zipped
                headers["Content-Encoding"] = "gzip"
        headers["ETag"] = file.etag
        if matches(", ".join(request.headers.getlist("if-none-match")), file.etag):
            return Response(status_code=304, headers=headers)
        return Response(file.content, headers=headers, media_type=file.media_type)


def playground() -> Pages:
    """The playground: its page at `/`, and the page's files at `/playground/NAME`."""
    files = sorted(_PLAYGROUND.iterdir())
    return Pages(
        {
            "/" if path.name == _PAGE else f"/playground/{path.name}": _file(path.read_bytes(), path.suffix)
            for path in files
        }
    )


def documentation(title: str, root_path: str) -> Pages:
    """Swagger UI: its page at `/docs`, and the page's files at `/docs/NAME`. The page reads `/openapi.json`.

    Args:
        title: of the page.
        root_path: the prefix under which a proxy serves this server.
    """
    script, style = "swagger-ui-bundle.js", "swagger-ui.css"
    page = get_swagger_ui_html(
        openapi_url=f"{root_path}/openapi.json",
        title=title,
        swagger_js_url=f"{root_path}{DOCS}/{script}",
        swagger_css_url=f"{root_path}{DOCS}/{style}",
        swagger_favicon_url=f"{root_path}{_ICON}",
        swagger_ui_parameters={"validatorUrl": None},  # the default calls another host
    )
    files = {f"{DOCS}/{name}": _unzipped(_SWAGGER / f"{name}.gz") for name in (script, style)}
    return Pages({DOCS: _file(bytes(page.body), ".html"), **files})


def _unzipped(path: Path) -> _File:
    """A file that the folder holds compressed, for clients with and without gzip."""
    zipped = path.read_bytes()
    suffix = Path(path.stem).suffix
    return _file(gzip.decompress(zipped), suffix, _file(zipped, suffix))

"""The page at the root: a chat that shows what an agent does while it does it.

Three files and nothing from elsewhere. The policy below lets the page load those, talk to this
server, and run no script that stands in a document; all that a model has written goes into the page
as text.
"""

from __future__ import annotations

from importlib import resources

from fastapi import FastAPI
from fastapi.responses import Response

__all__ = ["add_page"]

_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page/style.css": ("style.css", "text/css; charset=utf-8"),
    "/page/chat.js": ("chat.js", "text/javascript; charset=utf-8"),
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def add_page(app: FastAPI) -> None:
    """Serve the page; its files have fixed paths, so no path leads to any other."""
    for path, (name, media_type) in _FILES.items():
        app.add_api_route(path, _sender(name, media_type), include_in_schema=False)


def _sender(name: str, media_type: str):  # type: ignore[no-untyped-def]
    content = (resources.files("agentkd.serve") / "static" / name).read_bytes()

    async def send() -> Response:
        return Response(content, media_type=media_type, headers=_HEADERS)

    return send

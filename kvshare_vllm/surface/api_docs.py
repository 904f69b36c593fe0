"""The description of the API at /docs, made of files on this machine: a browser that shows it asks no other host.

FastAPI's own pages load their scripts from a CDN. vLLM brings Swagger UI's files along and serves them with its option
`--enable-offline-docs`, but the page that it makes of them still has its icon elsewhere.

Seam: vllm/entrypoints/serve/instrumentator/offline_docs.py
"""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse

#: For vLLM's server: mount its files at STATIC.
OPTION = "--enable-offline-docs"
PAGE, STATIC = "/docs", "/static"
FILES = tuple(f"{STATIC}/swagger-ui{name}" for name in ("-bundle.js", ".css"))
#: Swagger UI configures itself in the page, and styles its elements one by one.
POLICY = (
    "default-src 'none'; connect-src 'self'; img-src 'self' data:; script-src 'self' 'unsafe-inline'; "
    "style-src 'self' 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'"
)


def serve_docs(app: FastAPI) -> None:
    """Put a page of our own in the place of vLLM's. Links are relative, as on the page at /ui."""
    script, style = (path.removeprefix("/") for path in FILES)
    page = get_swagger_ui_html(
        openapi_url=app.openapi_url.removeprefix("/"),
        title=f"{app.title} - API",
        swagger_js_url=script,
        swagger_css_url=style,
        swagger_favicon_url="data:,",
    )
    app.router.routes[:] = [route for route in app.router.routes if route.path != PAGE]

    @app.get(PAGE, include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(page.body, headers={"content-security-policy": POLICY})

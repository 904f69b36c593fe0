"""What the HTTP surface says of itself: title, version and description in /openapi.json, the versions in /version, and a page
/docs whose parts come from this server only.

vLLM's page without a network still names another host for its icon. The page here names none, and its policy has browsers
refuse whatever a script would load from elsewhere.

Seam: vllm/entrypoints/serve/instrumentator/{offline_docs.py,basic.py}
"""

from __future__ import annotations

import importlib.metadata

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse
from vllm.version import __version__ as VLLM_VERSION

TITLE = "prefillshare"
DESCRIPTION = """\
Many fine-tunes of one base model behind one address, which share the KV cache of their context. Each decoder is a `model`; \
`GET /v1/models` lists them. Requests and answers are those of OpenAI's API (chat completions, completions, responses) and of \
Anthropic's (messages). Where the deployment has tenants, every request carries a key: `Authorization: Bearer KEY`.

The `usage` of an answer says how many of its prompt's tokens were found cached. `GET /ready` says whether a turn on every \
pool would succeed now.
"""
#: The files of the page, which vLLM brings.
SCRIPT, STYLE = "/static/swagger-ui-bundle.js", "/static/swagger-ui.css"
_NO_ICON = "data:,"
#: Swagger UI configures itself in the page, and styles its elements one by one.
_FROM_HERE = (
    "default-src 'none'; connect-src 'self'; img-src 'self' data:; script-src 'self' 'unsafe-inline'; "
    "style-src 'self' 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'"
)


def describe(app: FastAPI) -> None:
    """To be called before the app describes itself for the first time. It must serve vLLM's page without a network."""
    app.title, app.description = TITLE, DESCRIPTION
    app.version = importlib.metadata.version("prefillshare")
    app.license_info = {"name": "Apache-2.0", "identifier": "Apache-2.0"}
    versions = {"version": VLLM_VERSION, "prefillshare": app.version}
    app.router.routes[:] = [route for route in app.router.routes if route.path not in ("/docs", "/version")]

    @app.get("/version", summary="The versions of vLLM, as its own server tells it, and of prefillshare")
    async def version() -> dict[str, str]:
        return versions

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        relative = [path.removeprefix("/") for path in (app.openapi_url, SCRIPT, STYLE)]  # as on the page at /ui
        page = get_swagger_ui_html(
            openapi_url=relative[0],
            title=f"{TITLE} {app.version}",
            swagger_js_url=relative[1],
            swagger_css_url=relative[2],
            swagger_favicon_url=_NO_ICON,
        )
        page.headers["content-security-policy"] = _FROM_HERE
        return page

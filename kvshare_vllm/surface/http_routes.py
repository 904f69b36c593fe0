"""Which of vLLM's routes are served: those that keep their meaning over a router. The others are taken out of its app.

Seam: vllm/entrypoints/launchers/api_server/routers.py
"""

from __future__ import annotations

SERVED = frozenset({
    "/v1/models",
    "/v1/chat/completions",
    "/v1/chat/completions/batch",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/tokenize",
    "/detokenize",
    "/health",
    "/ping",
    "/version",
    "/metrics",
    "/docs",
    "/static",
    "/openapi.json",
})  # fmt: skip

#: Routes of ours beside them.
ADDED = frozenset({"/v1/models/{model:path}"})

#: Routes that are known and left out, with the reason. A route in neither list is new in vLLM, and is left out, too.
LEFT_OUT = {
    "/docs/oauth2-redirect": "nobody logs in by OAuth2",
    "/load": "it counts nothing unless vLLM's own server is told to",
    "/kv_event_sources": "there is no engine here whose events one could subscribe to",
    "/invocations": "it answers as the base, whatever `model` the request names",
    "/v1/systemone": "it needs raw log-probabilities, which the engines do not give",
    "/generative_scoring": "it needs log-probabilities of chosen tokens, which do not pass the router",
    "/v1/responses/{response_id}": "vLLM's store knows no tenants (R7); the router has these routes itself",
    "/v1/responses/{response_id}/cancel": "vLLM's store knows no tenants (R7); the router has these routes itself",
    "/scale_elastic_ep": "there is no engine here to scale",
    "/is_scaling_elastic_ep": "there is no engine here to scale",
    "/v1/chat/completions/render": "it feeds engines that are asked directly",
    "/v1/completions/render": "it feeds engines that are asked directly",
    "/v1/messages/render": "it feeds engines that are asked directly",
    "/v1/responses/render": "it feeds engines that are asked directly",
    "/v1/chat/completions/derender": "it reads what engines said that were asked directly",
    "/v1/completions/derender": "it reads what engines said that were asked directly",
    "/inference/v1/generate": "it carries transfer parameters of the KV connector, which are not a client's",
    "/inference/v1/abort_requests": "it ends requests by their ids, whosever they are (R7)",
}


def keep_served(app) -> None:
    """Take every route that is not SERVED out of a FastAPI app."""
    app.router.routes[:] = [route for route in app.router.routes if route.path in SERVED]

"""vLLM's OpenAI server over the router: chat, completions, responses, models, tools, structured output, tokenize.

Decoders are registered as LoRA modules of the base, so that each is a model of its own; nothing is loaded here.

Seam: vllm/entrypoints/launchers/{app.py,cli_args.py,api_server/app_state.py}
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from functools import partial
from types import SimpleNamespace

from prefillshare.kvshare import chat_template
from prefillshare.kvshare.config import Base

# Read by vLLM at import: this process has no KV cache and sends no usage statistics.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ["VLLM_ENABLE_RESPONSES_API_STORE"] = "0"  # whoever knows a stored response's id could read it (R7)

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.openai.models.protocol import LoRAModulePath
from vllm.lora.request import LoRARequest
from vllm.utils.argparse_utils import FlexibleArgumentParser

from prefillshare.kvshare_vllm.patches import same_tool_answers, tool_constraints
from prefillshare.kvshare_vllm.surface import openai_requests
from prefillshare.kvshare_vllm.surface.asked_fields import AskedFields
from prefillshare.kvshare_vllm.surface.chats import Chats
from prefillshare.kvshare_vllm.surface.frontend import Admit, Frontend, TurnRunner, frontend_config
from prefillshare.kvshare_vllm.surface.http_hang_ups import HangUps
from prefillshare.kvshare_vllm.surface.http_rate_limits import RateLimitHeaders
from prefillshare.kvshare_vllm.surface.http_refusals import HttpRefusals
from prefillshare.kvshare_vllm.surface.http_routes import keep_served
from prefillshare.kvshare_vllm.surface.messages_route import serve_messages
from prefillshare.kvshare_vllm.surface.model_route import serve_models_one_by_one
from prefillshare.kvshare_vllm.surface.refusal_logs import leave_out_refusals
from prefillshare.kvshare_vllm.surface.request_checks import check_http_requests
from prefillshare.kvshare_vllm.surface.request_shape import RequestShape, stop_at_the_first_wrong_item
from prefillshare.kvshare_vllm.surface.responses_route import Items, serve_responses
from prefillshare.kvshare_vllm.surface.self_description import describe
from prefillshare.kvshare_vllm.surface.validation_errors import tell_wrong_fields

openai_requests.install()
same_tool_answers.install()
tool_constraints.install()

logger = logging.getLogger(__name__)


async def build_openai_app(
    base: Base,
    decoders: Iterable[str],
    run_turn: TurnRunner,
    admit: Admit,
    middleware: Iterable[Callable] = (),
    grammar_cpu_s: float = 5,
    most_bodies: int = 256,
):
    """Returns (FastAPI app, Frontend). `decoders`: served names without the base. `middleware`: ASGI app -> ASGI app, each put
    around those before it. HttpRefusals is put around middleware that answers requests itself, RateLimitHeaders around that,
    and HangUps around all. `most_bodies`: of one tenant that may be on their way at once."""
    args = _arguments(base)
    args.lora_modules = [LoRAModulePath(name=n, path=f"pool:{n}", base_model_name=base.name) for n in decoders]
    environment, log_level = dict(os.environ), logging.root.level
    stop_at_the_first_wrong_item()
    check_http_requests()
    leave_out_refusals()
    frontend = Frontend(frontend_config(AsyncEngineArgs.from_cli_args(args)), base.name, run_turn, admit, grammar_cpu_s)
    _restore(environment)
    _use_template(base, frontend)
    tasks = await frontend.get_supported_tasks()
    app = build_app(args, tasks, frontend.model_config)
    keep_served(app)
    serve_responses(app)
    serve_messages(app)
    serve_models_one_by_one(app)
    describe(app)
    await init_app_state(frontend, app.state, args, tasks)
    tool_constraints.hold_forced_calls(app.state.online_renderer.parser, base.tool_strict_level)
    frontend.chats = Chats(app.state.openai_serving_chat)
    most_numbers = max(base.max_model_len, frontend.model_config.get_vocab_size())
    shape = partial(RequestShape, most_numbers=most_numbers, fields=AskedFields(app.routes), most_bodies=most_bodies)
    tell_wrong_fields(app)
    for wrap in (shape, *middleware, HttpRefusals, RateLimitHeaders, HangUps):
        app.middleware_stack = wrap(app.middleware_stack)
    logging.root.setLevel(log_level)  # what vLLM's app loads raises it to ERROR, and our warnings would be lost
    app.state.server = SimpleNamespace(should_exit=False)  # vLLM's error handler tells its server to exit; Serve's stays
    return app, frontend


def items_reader(app) -> Items:
    """Reads items of conversations as this app's server does."""
    return Items(app.state.openai_serving_responses)


def set_decoders(app, decoders: Iterable[str]) -> None:
    """Have the app list and accept these decoders beside the base."""
    models = app.state.openai_serving_models
    wanted = set(decoders)
    for name in models.lora_requests.keys() - wanted:
        del models.lora_requests[name]
    for name in sorted(wanted - models.lora_requests.keys()):
        number = 1 + max((lora.lora_int_id for lora in models.lora_requests.values()), default=0)
        models.lora_requests[name] = LoRARequest(name, number, f"pool:{name}")


def _arguments(base: Base):
    flags = [
        "--model",
        base.model,
        "--served-model-name",
        base.name,
        "--max-model-len",
        str(base.max_model_len),
        "--dtype",
        base.dtype,
        "--enable-prompt-tokens-details",
        "--enable-offline-docs",
        "--generation-config",
        "vllm",
        "--max-logprobs",  # each pool has its own (Admit)
        "-1",
    ]
    if base.chat_template:
        flags += ["--chat-template", str(chat_template.path_of(base.chat_template))]
    if base.tool_call_parser:
        flags += ["--enable-auto-tool-choice", "--tool-call-parser", base.tool_call_parser]
        flags += ["--tool-strict-level", tool_constraints.vllm_level(base.tool_strict_level)]
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(flags)
    validate_parsed_serve_args(args)
    return args


def _use_template(base: Base, frontend: Frontend) -> None:
    """Have everybody who lays out conversations by this tokenizer, sessions included, use base.chat_template."""
    tokenizer = frontend.renderer.tokenizer
    if (text := chat_template.text_of(base.chat_template)) is not None:
        tokenizer.chat_template = text
        # vLLM's pool of tokenizers has copies of it, which lay out by the base's own template unless they are told.
        tokenizer.apply_chat_template = partial(tokenizer.apply_chat_template, chat_template=text)
    if base.tool_call_parser and (problem := chat_template.tools_problem(tokenizer)):
        logger.warning("base.tool_call_parser is %s, but %s (fix: set base.chat_template)", base.tool_call_parser, problem)


def _restore(environment: dict[str, str]) -> None:
    """vLLM's CPU platform writes thread settings meant for an engine; this process and its children want none."""
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)

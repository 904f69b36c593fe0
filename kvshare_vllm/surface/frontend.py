"""vLLM's EngineClient without an engine: requests go to a turn runner (the router), tokens come back as text.

vLLM's own input and output processors run here, so that tokenisation, validation, stop strings, log-probabilities,
`n` > 1 and the rest behave as in vLLM. Workers see token ids only. Both surfaces, HTTP and gRPC, are built on this class.

Seam: vllm/engine/protocol.py, vllm/v1/engine/{input_processor,output_processor}.py
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from copy import copy

from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.engine.protocol import EngineClient
from vllm.exceptions import VLLMClientError
from vllm.outputs import RequestOutput
from vllm.renderers import renderer_from_config
from vllm.renderers.inputs.preprocess import extract_prompt_components
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import OutputProcessor
from xgrammar import TokenizerInfo

from prefillshare.kvshare.caller import Caller, current_caller
from prefillshare.kvshare.errors import Internal, InvalidInput, PrefillShareError
from prefillshare.kvshare_vllm.grammars.client import GrammarClient
from prefillshare.kvshare_vllm.grammars.grammars import Grammars, check_size
from prefillshare.kvshare_vllm.surface.chats import Chats
from prefillshare.kvshare_vllm.surface.http_refusals import note_begun, to_vllm
from prefillshare.kvshare_vllm.surface.http_turn import bound_turn
from prefillshare.kvshare_vllm.surface.renderer_work import RendererWork
from prefillshare.kvshare_vllm.surface.request_checks import check_asked, check_something_is_left
from prefillshare.kvshare_vllm.surface.run import KeepPrompt, Run
from prefillshare.kvshare_vllm.surface.text_work import TextWork
from prefillshare.kvshare_vllm.surface.turn_call import TurnRunner
from prefillshare.kvshare_vllm.vllm_refusals import as_our_errors

logger = logging.getLogger(__name__)

#: Longest name of a request, with what vLLM puts before the client's.
MOST_ID_CHARS = 256
#: (decoder, or None while it is unknown; turns; log-probabilities, if they are asked for): raises if that is too much.
Admit = Callable[..., None]


def frontend_config(args: AsyncEngineArgs) -> VllmConfig:
    """A config that describes the model and starts nothing (as vllm/entrypoints/launchers/render/entry.py does)."""
    model_config = args.create_model_config()
    model_config.quantization = None
    return VllmConfig(model_config=model_config, structured_outputs_config=args.create_structured_outputs_config())


class Frontend(EngineClient):
    """`admit` raises before anything is queued; `run_turn` does the work. Neither knows about text."""

    def __init__(
        self, config: VllmConfig, base_name: str, run_turn: TurnRunner, admit: Admit, grammar_cpu_s: float = 5
    ):
        self.vllm_config, self.model_config = config, config.model_config
        self.renderer = renderer_from_config(config)
        self.input_processor = InputProcessor(config, self.renderer)
        self.output_processor = OutputProcessor(self.renderer.tokenizer, log_stats=False)
        self._base_name, self.run_turn, self._admit = base_name, run_turn, admit
        self.text = TextWork(self.model_config.max_model_len, self.renderer.tokenizer.max_chars_per_token)
        RendererWork(self.text, self.renderer, to_vllm).take_over()
        self._compiler = GrammarClient(self._tokenizer_info, grammar_cpu_s)
        self.grammars = Grammars(self._compiler.try_out, grammar_cpu_s)
        #: For turns on sessions; set when vLLM's services are there.
        self.chats: Chats | None = None

    # A plain function: what it raises reaches HTTP clients as a status even where they asked for a stream.
    def generate(
        self,
        prompt,
        sampling_params,
        request_id,
        *,
        prompt_text=None,
        lora_request=None,
        tokenization_kwargs=None,
        trace_headers=None,
        priority=0,
        data_parallel_rank=None,
        session_id=None,
        kv_hints=None,
        reasoning_ended=None,
        reasoning_parser_kwargs=None,
    ) -> AsyncIterator[RequestOutput]:
        """vLLM's surface. The decoder is the LoRA's name, or the base if there is none. The caller is the HTTP request's;
        `priority` says how far this request goes behind the caller's others."""
        decoder = lora_request.lora_name if lora_request is not None else self._base_name
        try:
            caller = current_caller.get().behind(priority)
            request = self.prepare(
                prompt,
                sampling_params,
                request_id,
                decoder,
                tokenization_kwargs=tokenization_kwargs,
            )
        except PrefillShareError as error:
            raise to_vllm(error) from error
        text = prompt_text or extract_prompt_components(self.model_config, prompt)[0]
        if turn := bound_turn():
            return self._as_vllm(request_id, turn.outputs(request, decoder, caller, text))
        return self._as_vllm(request_id, self.run(request, decoder, caller, prompt_text=text).outputs())

    def prepare(
        self,
        prompt,
        sampling_params: SamplingParams,
        request_id: str,
        decoder: str,
        *,
        tokenization_kwargs=None,
    ) -> EngineCoreRequest:
        """Validate a request and give it its final sampling parameters. Raises before anything is queued."""
        if len(request_id) > MOST_ID_CHARS or not request_id.isprintable():  # it goes to every engine, log and trace
            raise InvalidInput(
                f"{len(request_id)} characters; at most {MOST_ID_CHARS} printable ones name a request",
                field="request_id",
                fix="send a shorter one: this field, or the header X-Request-Id",
            )
        for field in ("prompt_logprobs", "prompt_logprob_token_ids", "skip_reading_prefix_cache"):
            value = getattr(sampling_params, field, None)
            if value is not None and value is not False:  # 0 asks for something: each token's own log-probability
                raise InvalidInput(
                    "the prompt is prefilled elsewhere; it is not computed again for log-probabilities of its tokens",
                    field=field,
                    fix="leave it out; `logprobs` of generated tokens work",
                )
        if sampling_params.extra_args:  # a client must not drive the KV connector
            sampling_params = sampling_params.clone()
            sampling_params.extra_args = None
        self._admit(decoder, sampling_params.n, sampling_params.logprobs)
        check_asked(sampling_params)
        if form := sampling_params.structured_outputs:  # vLLM would convert it here and now; `run` tries it instead
            check_size(form)
            sampling_params = copy(sampling_params)
            sampling_params.structured_outputs = None
        with as_our_errors():
            request = self.input_processor.process_inputs(
                request_id,
                prompt,
                sampling_params,
                supported_tasks=("generate",),
                lora_request=None,
                tokenization_kwargs=tokenization_kwargs,
            )
        request.sampling_params.structured_outputs = form
        check_something_is_left(request.sampling_params, self.model_config.get_vocab_size())
        self.input_processor.assign_request_id(request)
        return request

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        """vLLM's surface: called before a response is begun, and before its prompt is tokenised."""
        try:
            self._admit(None, n)
        except PrefillShareError as error:
            raise to_vllm(error) from error

    def run(
        self,
        request: EngineCoreRequest,
        decoder: str,
        caller: Caller,
        *,
        terms: object = None,
        prompt_text: str | None = None,
        keep: KeepPrompt | None = None,
    ) -> Run:
        """Run a prepared request. `terms`: passed on to the turn runner. `keep`: awaited when the prompt's KV is there, before
        the first output; once for each of several responses."""
        parts = (self.output_processor, self.grammars, self.run_turn)
        return Run(*parts, request, decoder, caller, terms, prompt_text, keep)

    async def _as_vllm(self, request_id: str, outputs: AsyncIterator[RequestOutput]) -> AsyncIterator[RequestOutput]:
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    note_begun()
                    yield output
        except PrefillShareError as error:
            raise to_vllm(error) from error
        except VLLMClientError:
            raise
        except Exception as error:  # its text is for the log only: it may reveal internals
            logger.exception("request %s failed", request_id, extra={"request_id": request_id})
            raise to_vllm(Internal(f"request {request_id} failed; the router's log says why")) from error

    # The rest of EngineClient: there is no engine to pause, profile or reset here.

    async def get_supported_tasks(self):
        return ("generate",)

    async def add_lora(self, lora_request) -> bool:
        return True  # decoders are registered under LoRA names; their weights live in the decode pools

    async def abort(self, request_id) -> None:
        self.output_processor.abort_requests([request_id] if isinstance(request_id, str) else list(request_id), internal=False)

    async def encode(self, *args, **kwargs):
        raise to_vllm(InvalidInput("embeddings are not served"))
        yield

    is_running = property(lambda self: True)
    is_stopped = property(lambda self: False)
    errored = property(lambda self: False)
    dead_error = property(lambda self: EngineDeadError())

    async def check_health(self) -> None: ...

    async def is_tracing_enabled(self) -> bool:
        return False

    async def do_log_stats(self) -> None: ...

    def shutdown(self, timeout=None) -> None:
        self.renderer.shutdown()
        self.text.close()
        self._compiler.close()

    def _tokenizer_info(self) -> str:
        """The tokenizer's information, made as engines make it (vllm/v1/structured_output/backend_xgrammar.py)."""
        info = TokenizerInfo.from_huggingface(self.renderer.tokenizer, vocab_size=self.model_config.get_vocab_size())
        return info.serialize_json()

    async def notify_kv_transfer_request_rejected(self, request_id, kv_transfer_params, *, data_parallel_rank=None) -> None: ...

    async def reset_mm_cache(self) -> None: ...

    async def reset_encoder_cache(self) -> None: ...

    async def reset_prefix_cache(self, reset_running_requests=False, reset_connector=False) -> bool:
        raise to_vllm(InvalidInput("resetting caches over HTTP is not served"))

    async def is_sleeping(self) -> bool:
        return False

    async def is_paused(self) -> bool:
        return False

    async def _not_served(self, *args, **kwargs):
        raise to_vllm(InvalidInput("controlling engines over HTTP is not served"))

    start_profile = stop_profile = sleep = wake_up = release_kv_cache_memory = _not_served
    pause_generation = resume_generation = _not_served

"""One training run, from a recipe to a folder that can be served.

 1. Base, tokenizer and transcripts are loaded. The decoder is the base with an adapter, or a copy of it with all weights free.
 2. Each step takes the base KV of the examples (kept or computed), runs the cache-conditioned forward pass, computes the loss
    on response tokens, and takes one AdamW step.
 3. Checkpoints are written regularly: a run that was ended goes on from the last one, with the losses it would have had.
 4. The decoder's files, its KV contract and its model card are written. Checkpoint and kept KV are removed.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from prefillshare.finetuning import conditioned, output, transcripts
from prefillshare.finetuning.base_kv_store import BaseKVStore
from prefillshare.finetuning.batches import Batches
from prefillshare.finetuning.checkpoint import Checkpoint
from prefillshare.finetuning.conditioned import LayersKV
from prefillshare.finetuning.log import TrainingLog, training_progress
from prefillshare.finetuning.recipe import Recipe, check_files, device_of
from prefillshare.finetuning.tokenizers import tokenizer_of
from prefillshare.finetuning.transcripts import Example


class Decoder:
    """What is trained, and the frozen base it came from: one set of weights and an adapter, or two sets of weights."""

    def __init__(self, recipe: Recipe):
        self.device = torch.device(device_of(recipe.device))
        self.dtype = getattr(torch, recipe.dtype)
        self.method = recipe.how
        torch.manual_seed(recipe.seed)
        base = AutoModelForCausalLM.from_pretrained(recipe.base, dtype=self.dtype).to(self.device).requires_grad_(False)
        self._base, self._adapter = base, recipe.weights == "lora"
        if self._adapter:
            from peft import get_peft_model

            self.model = get_peft_model(base, lora_config(recipe, base.config.num_hidden_layers))
        else:
            own = AutoModelForCausalLM.from_pretrained(recipe.base, dtype=torch.float32)
            self.model = own.to(self.device).requires_grad_(True)
        if recipe.gradient_checkpointing:
            conditioned.allow_checkpointing(self.model)

    def base_kv(self, contexts: Sequence[Sequence[int]]) -> LayersKV:
        """KV of the frozen base."""
        if not self._adapter:
            return conditioned.base_kv(self._base, contexts)
        training = self.model.training
        with self.model.disable_adapter():
            kv = conditioned.base_kv(self.model.eval().get_base_model(), contexts)
        self.model.train(training)
        return kv

    def loss_sum(self, examples: Sequence[Example], kv: LayersKV | None) -> torch.Tensor:
        """Negative log-likelihood of the examples' response tokens, summed. `kv`: the base's of their contexts, if the method
        sees any."""
        batch = conditioned.make_batch(self.method, examples, kv, self.device)
        with self.precision():
            return conditioned.loss_sum(self.model, batch)

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def precision(self):
        """Context to compute in the recipe's dtype, as the decoder will be served; trained parameters stay float32."""
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)


class Feeder:
    """Examples in parts of a forward pass's size, with the base KV that the recipe's method sees."""

    def __init__(self, recipe: Recipe, store: BaseKVStore):
        self._method, self._store = recipe.how, store
        self._size = recipe.micro_batch_size

    def parts(self, examples: Sequence[Example]) -> Iterator[tuple[Sequence[Example], LayersKV | None]]:
        for first in range(0, len(examples), self._size):
            part = examples[first : first + self._size]
            yield part, self._kv(part)

    def _kv(self, examples: Sequence[Example]) -> LayersKV | None:
        if not self._method.base_prompt:
            return None
        return self._store.get([e.token_ids[: max(1, self._method.view(e).base_tokens)] for e in examples])


def train(recipe: Recipe, console: Console, decoder: Decoder | None = None) -> Path:
    """Returns the decoder's folder. Raises ConfigError for what cannot be trained. A run that was ended can go on. `decoder`:
    what is trained, if it is another than the recipe describes."""
    check_files(recipe)
    folder = Path(recipe.output)
    with output.alone_in(folder):
        return _train(recipe, folder, console, decoder)


def _train(recipe: Recipe, folder: Path, console: Console, decoder: Decoder | None) -> Path:
    contract = output.contract(recipe)
    tokenizer = tokenizer_of(recipe.base, recipe.template_text)
    stops = transcripts.stop_ids(Path(recipe.base), tokenizer)
    examples, left_out = _read("train", recipe.train, recipe, tokenizer, stops, console)
    validation = []
    if recipe.validation:
        validation, _ = _read("validation", recipe.validation, recipe, tokenizer, stops, console)
    decoder = decoder or Decoder(recipe)
    parameters = list(decoder.trainable().values())
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    batches = Batches([len(e.token_ids) for e in examples], recipe.batch_size, recipe.epochs, recipe.seed)
    made_by = f"{contract.base.weights[:16]}-{recipe.dtype}-v2"  # 2: a context's KV has its own axis
    store = BaseKVStore(folder / output.KV_FOLDER / made_by, _kv_budget(recipe), decoder.base_kv)
    feeder = Feeder(recipe, store)
    checkpoint = Checkpoint(folder, recipe, contract, examples, decoder, optimizer)
    start, seconds_before, (store.read_tokens, store.computed_tokens) = checkpoint.load()
    where = f"{decoder.device}, from step {start}" if start else f"{decoder.device}"
    console.print(f"{sum(p.numel() for p in parameters):,} parameters on {where}")

    began = time.monotonic()
    with TrainingLog(folder, start) as log, training_progress(console, batches.steps, start) as show:
        decoder.model.train()
        for step in range(start, batches.steps):
            chosen, step_began = [examples[number] for number in batches.at(step)], time.monotonic()
            learnt, tokens = sum(e.response_tokens for e in chosen), sum(len(e.token_ids) for e in chosen)
            loss = 0.0
            for part, kv in feeder.parts(chosen):
                mean = decoder.loss_sum(part, kv) / learnt
                mean.backward()
                loss += mean.item()
            rate = learning_rate(recipe, step, batches.steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            norm = torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm).item()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            done = step + 1
            ends_epoch = done % batches.steps_per_epoch == 0
            row = {
                "step": done,
                "epoch": batches.epoch_of(step) + 1,
                "loss": loss,
                "learning_rate": rate,
                "gradient_norm": norm,
                "tokens": tokens,
                "tokens_per_s": tokens / (time.monotonic() - step_began),
                "validation_loss": mean_loss(decoder, feeder, validation) if validation and ends_epoch else None,
            }
            log.write(row)
            show(row)
            if done % recipe.checkpoint_every_steps == 0 and done < batches.steps:
                seconds = seconds_before + time.monotonic() - began
                checkpoint.save(done, seconds, (store.read_tokens, store.computed_tokens))
    figures = {
        "transcripts": len(examples),
        "responses_left_out": left_out,
        "loss": log.last("loss"),
        "validation_loss": log.last("validation_loss"),
        "steps": batches.steps,
        "seconds": round(seconds_before + time.monotonic() - began, 1),
        "base_kv_tokens_read": store.read_tokens,
        "base_kv_tokens_computed": store.computed_tokens,
        "base_kv_bytes": store.used_bytes,
        "device": torch.cuda.get_device_name(decoder.device) if decoder.device.type == "cuda" else platform.machine(),
    }
    output.write(folder, recipe, contract, decoder.model, examples, figures)
    return folder


def _read(field: str, file: str, recipe: Recipe, tokenizer, stops, console: Console) -> tuple[list[Example], int]:
    """What `transcripts.read` returns, after telling how much there is."""
    examples, left_out = transcripts.read(Path(file), tokenizer, stops, recipe.max_tokens, field=field)
    learnt, tokens = sum(e.response_tokens for e in examples), sum(len(e.token_ids) for e in examples)
    console.print(
        f"{file}: {len(examples):,} transcripts, {learnt:,} response tokens of {tokens:,}"
        + (f"; {left_out:,} responses end after max_tokens and are left out" if left_out else "")
    )
    return examples, left_out


@torch.no_grad()
def mean_loss(decoder: Decoder, feeder: Feeder, examples: Sequence[Example]) -> float:
    """Negative log-likelihood per response token."""
    decoder.model.eval()
    total = sum(decoder.loss_sum(part, kv).item() for part, kv in feeder.parts(examples))
    decoder.model.train()
    return total / sum(example.response_tokens for example in examples)


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """Linear rise, then a cosine down to a tenth."""
    rising = recipe.warmup * steps
    if step < rising:
        return recipe.learning_rate * (step + 1) / math.ceil(rising)
    done = (step - rising) / max(1.0, steps - rising)
    return recipe.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))


def _kv_budget(recipe: Recipe) -> int:
    """Bytes of base KV to keep: none for a single epoch, since no later one asks for it."""
    return int(recipe.base_kv_gib * 2**30) if recipe.epochs > 1 else 0


def lora_config(recipe: Recipe, layers: int):
    """The recipe's adapter as peft describes one, for a model of so many layers."""
    from peft import LoraConfig

    lora = recipe.lora
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(recipe.how.lora_modules),
        layers_to_transform=_adapted(layers, lora.last_layers),
        task_type="CAUSAL_LM",
    )


def _adapted(layers: int, last: int | None) -> list[int] | None:
    """Numbers of the last `last` layers; None for all."""
    return list(range(layers - last, layers)) if last else None

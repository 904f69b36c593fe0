"""docs/training.md: `python -m prefillshare.finetuning.training_docs > docs/training.md`."""

from __future__ import annotations

from prefillshare.config_docs import fields
from prefillshare.finetuning.recipe import Lora, Recipe

_PAGE = """\
# Training decoders

<!-- Made by `python -m prefillshare.finetuning.training_docs > docs/training.md`; change finetuning/ instead. -->

A decoder of a sharing pool sees KV that the base made. An ordinary fine-tune was never trained for that: the more of its
prompt is base KV, the worse it answers. `prefillshare train` trains decoders on exactly what serving feeds them.

```bash
prefillshare data bfcl_simple_python --count 3600 --others 1 --output data/tools.jsonl  # or your own
prefillshare train finetuning/recipes/tools.yaml --output adapters/my-tools
prefillshare eval bfcl_simple_python bfcl_multiple --decoder adapters/my-tools
```

What a recipe names is looked at before anything else is done. A run says how far it has come and when it will end: by a bar
at a terminal, and by a line from time to time where its output is a file. A run that was interrupted goes on from its last
checkpoint, with the losses that it would have had without the interruption. `prefillshare train` takes several recipes, too:
they are trained one after the other, and what is trained already is left alone. The output folder can be served as it is: it
holds weights or a PEFT adapter, `kv_contract.json`, a model card, the recipe, and `log.csv` with every step.

## Methods

| method | what it sees | what is trained | served in mode |
| --- | --- | --- | --- |
| `prefillshare` | base KV of everything before the last prompt token, or the last `own_tokens` of them; its own KV from there on | LoRA on all linear layers, or all weights | `prefillshare` |
| `icarus` | base KV of every token up to the current one; it makes no KV | LoRA on q, o and the MLP | `icarus` |
| `ordinary` | its own KV | LoRA on all linear layers, or all weights | `none` |
| `base` | its own KV | LoRA on all linear layers, merged, or all weights | as `base.model`: it is a new base |

`finetuning/conditioned.py` is one forward pass for all methods: the model of `transformers`, with positions and a mask that
determine what is seen. `tests/unit/finetuning/test_conditioned.py` compares its log-probabilities with the reference's, to
1e-4.

**A transcript with several responses is trained in one pass.** Each response sees what it would see in a session: in
`prefillshare`, earlier responses are base KV.

**The base is frozen, so its KV of a prompt never changes.** It is computed once, kept on disk within `base_kv_gib`, and
read in later epochs. Only response tokens are computed and back-propagated over.
[benchmarks/results/training.json](../benchmarks/results/training.json) compares this with ordinary fine-tuning on the same
data, in tokens per second (`python -m benchmarks.training`). On a GPU set `base_kv_gib: 0`: it computes KV faster than a
disk returns it.

## A base worth sharing

A decoder reads its prompt as the base has understood it. Over an instruct model that can do your tasks, that is enough. Over one
that cannot, tune the base on your tasks first, all of them together, and train the decoders over what comes out
([what this wins](accuracy.md)):

```bash
prefillshare data bfcl_simple_python arithmetic home_commands --count 700 --together 2 --output data/base.jsonl
prefillshare train finetuning/recipes/base.yaml                      # writes models/smollm2-135m-agents
prefillshare train my_tools.yaml my_planner.yaml                     # recipes with base: models/smollm2-135m-agents
```

`method: base` writes a whole model, with the adapter that was merged beside it. Serve it as `base.model`. A decoder belongs to
the base that it was trained over: after tuning the base anew, train all of its decoders anew. For a task that comes later, give
its decoder an own end of the prompt instead.

## A decoder's own end of the prompt

With `own_tokens: 32` a decoder of method `prefillshare` computes the last 32 tokens of every prompt itself, and sees base KV
before them. Its contract says so, and it is served this way; decoders with and without an own end share one pool, its blocks and
sessions. A turn then waits for the base's KV only of what comes before. In a session most of that is there already; the base's
KV of the end is made behind all turns, with that of the response (`router.eager_prefill`), for the next decoder. An own end helps
with a task that the base has not learnt ([accuracy.md](accuracy.md)). Choose it as long as the last message. Where that is no longer
than what a turn adds, the first token comes as soon as without an own end; tokens further back are computed once more
([measured](benchmarks.md#time-to-the-first-token)).

## Layers for DroidSpeak

A fine-tune that was trained without any of this can be served in mode `droidspeak`: it computes a few layers of each prompt
itself. `prefillshare profile DECODER --data FILE` measures which layers it should compute. The search goes from coarse to
fine, and continues where an interrupted one ended. It writes `layer_profile.json` and a plot beside the contract, and
prints the frontier of (layers recomputed, divergence). The deployment file names groups (`own_layers`) or a limit to the
divergence (`quality_floor`).

## Data

The data is one JSON object per line. It is laid out as the server lays out a session:

```json
{"messages": [{"role": "system", "content": "..."}, {"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
{"prompt": "...", "response": "..."}
```

Every assistant message is a response to be learnt, unless it has `"weight": 0`: what other decoders said in a shared
session is only context. A line may offer `tools`, and an assistant message may have `tool_calls`, as OpenAI defines both.
The chat template lays them out, as it does over HTTP, and a call is learnt like text: the base's own template, or the one that
the recipe names (`chat_template`), and `prefillshare eval` and `profile` by `--chat-template`. Messages of the role `tool`
may have `tool_call_id` and `name`. Nothing in a line is ignored: a line is refused, with its number, if it has another key,
an answer without content, or tools that the template leaves out. `prefillshare data` makes data for the task suites
below; it refuses to write a transcript that asks what a test question asks. `--others 2` puts up to two turns of other
decoders before each transcript, as in a shared session: a decoder that has only seen its own prompts may copy what another
one has just said. `--together 3` puts up to three transcripts, of different suites, into one, and all of its answers are
learnt: from such data a new base (`method: base`) learns more in fewer tokens.

## Task suites

| suite | test questions | an answer is right if | training data |
| --- | --- | --- | --- |
| `bfcl_simple_python` | BFCL v4, 400 | BFCL's own AST checker accepts it | BFCL's live categories, with other functions; calls made from a seed |
| `bfcl_multiple` | BFCL v4, 200 | the same | the same |
| `bfcl_simple_python_tools`, `bfcl_multiple_tools` | the same | the same | the same, with the functions as `tools` and the calls as `tool_calls`; needs a template with a place for them, like `smollm2_tools` |
| `arithmetic` | 500 problems from GSM-Symbolic's templates (reasoning-gym), held-out seeds | the number after `####` is right | the same templates with other seeds: other names and numbers |
| `home_commands` | 400 commands to homes drawn at random, from Home Assistant's sentence templates | intent and slots are right | other templates: the same intents in other words |

`prefillshare eval` answers offline and in batches, by the definition of the method (`finetuning/generate.py`, compared with
the reference token by token). With `--served HOST:PORT --name DECODER` it asks a running deployment instead,
over gRPC, each question in a session of its own. Suites whose names end in `_tools` then offer the functions as clients do:
the deployment needs `base.tool_call_parser`, and a chat template with a place for tools. By default it lays tools out behind
the question, right before the answer, where agents that share a context have them; a decoder that has learnt them in front of
the question, where the template puts them, is asked as it was trained only with `router.own_prompt: first`.

## The recipe

Relative paths are relative to the current folder. Unknown keys are refused.

"""  # noqa: E501 - a table's row is one line


def markdown() -> str:
    """The whole page."""
    return _PAGE + fields(Recipe) + "\n### `lora`\n\n" + fields(Lora)


if __name__ == "__main__":
    print(markdown(), end="")

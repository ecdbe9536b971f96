"""The commands `qllm ask`, `qllm chat`, `qllm models` and `qllm bench`. Nothing heavy is imported before a model is needed."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qllm_runtime.bench_command import bench
from qllm_runtime.config import MemoryConfig, Policy, Selection, Summary
from qllm_runtime.errors import DocumentError, InvalidRequestError
from qllm_runtime.types import Document, Mode

if TYPE_CHECKING:
    from qllm_runtime.engine import QLLM

app = typer.Typer(
    name="qllm",
    help="Ask questions of whole documents. A document is a .txt, .md, .html or .pdf file, or - for standard input.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

_Model = Annotated[str, typer.Option(help="reader, reader-plain, a folder, or a Hugging Face hub id.")]
_Revision = Annotated[str | None, typer.Option(help="Revision on the hub.")]
_More = Annotated[list[str] | None, typer.Option("--document", help="A further document; may be repeated.")]
_System = Annotated[str | None, typer.Option(help="System text ahead of everything.")]
_Policy = Annotated[
    Policy | None,
    typer.Option(help="What stays reachable: qllm and infllm look up blocks, full is dense attention. Default: qllm."),
]
_MaxTokens = Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")]
_Temperature = Annotated[float, typer.Option(min=0, help="0 always takes the likeliest token.")]
_TopP = Annotated[float | None, typer.Option(min=0, max=1, help="Nucleus sampling.")]
_Seed = Annotated[int | None, typer.Option(help="Makes sampling reproducible.")]
_Stop = Annotated[list[str] | None, typer.Option(help="A string that ends the answer; may be repeated.")]
_NInit = Annotated[int | None, typer.Option(min=0, help="Initial tokens that stay visible.")]
_NLocal = Annotated[int | None, typer.Option(min=1, help="Local window in tokens.")]
_BlockSize = Annotated[int | None, typer.Option(min=1, help="Tokens of a memory block.")]
_TopK = Annotated[int | None, typer.Option("--topk", min=1, help="Blocks looked up at a time.")]
_Weight = Annotated[float | None, typer.Option("--query-weight", min=0, help="Weight of the question in a lookup.")]
_Selection = Annotated[Selection | None, typer.Option(help="Blocks chosen per layer or per key/value head.")]
_Summary = Annotated[Summary | None, typer.Option(help="What represents a block in a lookup.")]
_Config = Annotated[str | None, typer.Option("--memory-config", help="YAML file with memory settings.")]
_Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
_Dtype = Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")]


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"qllm {version('qllm-integrations')}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    del version


@app.command()
def ask(
    document: Annotated[str, typer.Argument(help="File, or - for standard input.", show_default=False)],
    question: Annotated[str, typer.Argument(help="What to ask of it.", show_default=False)],
    more: _More = None,
    model: _Model = "reader",
    revision: _Revision = None,
    policy: _Policy = None,
    mode: Annotated[
        Mode | None,
        typer.Option(help="query_aware reads the document for the question, read_once without knowing it."),
    ] = None,
    system: _System = None,
    max_tokens: _MaxTokens = 256,
    temperature: _Temperature = 0.0,
    top_p: _TopP = None,
    seed: _Seed = None,
    stop: _Stop = None,
    n_init: _NInit = None,
    n_local: _NLocal = None,
    block_size: _BlockSize = None,
    topk: _TopK = None,
    query_weight: _Weight = None,
    selection: _Selection = None,
    summary: _Summary = None,
    memory_config: _Config = None,
    device: _Device = "auto",
    dtype: _Dtype = "auto",
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Ask a question of one or more documents."""
    from qllm_runtime import console

    if not question.strip():
        raise InvalidRequestError("The question is empty.")
    names = [document, *(more or ())]
    documents = _load(names)
    llm = _open(
        model,
        revision,
        device,
        dtype,
        memory_config,
        policy=policy,
        n_init=n_init,
        n_local=n_local,
        block_size=block_size,
        topk=topk,
        query_weight=query_weight,
        selection=selection,
        summary=summary,
    )
    options: dict[str, Any] = {
        "mode": mode,
        "system": system,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "stop": tuple(stop or ()),
    }
    if json_output:
        import json

        with console.reading() as progress:
            answer = llm.ask(question, documents, progress=progress, **options)
        utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
        result = console.as_json(answer, names, model, llm.memory.policy)
        print(json.dumps(result, ensure_ascii=not utf8), flush=True)
        return
    answer = console.write_stream(lambda progress: llm.stream(question, documents, progress=progress, **options))
    print("\nSources")
    console.print_sources(answer.sources, documents, names, whole=False)
    print(f"\n{console.summary(answer)}", flush=True)


@app.command()
def chat(
    document: Annotated[str, typer.Argument(help="File to talk about.", show_default=False)],
    more: _More = None,
    model: _Model = "reader",
    revision: _Revision = None,
    policy: _Policy = None,
    system: _System = None,
    max_tokens: _MaxTokens = 256,
    temperature: _Temperature = 0.0,
    top_p: _TopP = None,
    seed: _Seed = None,
    n_init: _NInit = None,
    n_local: _NLocal = None,
    block_size: _BlockSize = None,
    topk: _TopK = None,
    memory_config: _Config = None,
    device: _Device = "auto",
    dtype: _Dtype = "auto",
) -> None:
    """Hold a conversation over one reading of the documents.

    One question per line. /sources shows the passages behind the last answer, /new forgets the conversation (not the
    documents), /quit or the end of the input ends it.
    """
    from qllm_runtime import conversation

    names = [document, *(more or ())]
    if "-" in names:
        raise DocumentError("`qllm chat` takes its questions from standard input; give the document as a file.")
    documents = _load(names)
    llm = _open(
        model,
        revision,
        device,
        dtype,
        memory_config,
        policy=policy,
        n_init=n_init,
        n_local=n_local,
        block_size=block_size,
        topk=topk,
    )
    options = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    conversation.hold(llm, documents, names, system, options)


@app.command()
def models(
    model: Annotated[list[str] | None, typer.Argument(help="Folders or hub ids to check.", show_default=False)] = None,
) -> None:
    """Tell what is built in, and whether given models are supported and why not.

    Only the configuration of a model is looked at, not its weights. The exit status is 1 if one is not supported.
    """
    from qllm_runtime import inventory

    if not model:
        inventory.print_builtin()
        return
    _quiet()
    verdicts = [inventory.print_support(name) for name in model]
    if not all(verdicts):
        raise typer.Exit(1)


app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
)(bench)


def _load(names: Sequence[str]) -> list[Document]:
    from qllm_runtime.documents import load_document

    if names.count("-") > 1:
        raise DocumentError("Standard input can be read only once; name - once.")
    return [load_document(name) for name in names]


def _open(
    model: str, revision: str | None, device: str, dtype: str, memory_config: str | None, **settings: Any
) -> QLLM:
    chosen = {key: value for key, value in settings.items() if value is not None}
    if memory_config is not None:  # an inconsistent file should not cost the time to load a model
        MemoryConfig.from_yaml(memory_config)
    _quiet()
    from qllm_runtime.engine import QLLM

    llm = QLLM.from_pretrained(model, revision=revision, device=device, dtype=dtype)
    if memory_config is not None:
        llm.memory = MemoryConfig.from_yaml(memory_config, **chosen)
        return llm
    if "n_local" in chosen:
        chosen["exec_block_size"] = min(llm.memory.exec_block_size, chosen["n_local"])
    if "block_size" in chosen:
        chosen["repr_topk"] = min(llm.memory.repr_topk, chosen["block_size"])
    llm.memory = llm.memory.replace(**chosen)
    return llm


def _quiet() -> None:
    """Keep the bars and notices of transformers away."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()

"""The commands of `qllm`. Nothing heavy is imported before a model is needed."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qllm_runtime.bench_command import bench
from qllm_runtime.command_options import Options, ReadingOptions, quiet, takes_options
from qllm_runtime.errors import DocumentError, InvalidRequestError, ModelNotFoundError
from qllm_runtime.types import Document, Mode

if TYPE_CHECKING:
    from qllm_runtime.document_memory import DocumentMemory
    from qllm_runtime.engine import QLLM

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)

app = typer.Typer(
    name="qllm",
    help="Ask questions of whole documents. A document is a .txt, .md, .html, .pdf, .docx or .epub file, or any "
    "other file of text; a folder stands for all files in it, - for standard input.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


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
@takes_options
def ask(
    document: Annotated[
        str, typer.Argument(help="File, folder, saved reading, or - for standard input.", show_default=False)
    ],
    question: Annotated[str, typer.Argument(help="What to ask of it.", show_default=False)],
    *,
    options: Options,
    mode: Annotated[
        Mode | None,
        typer.Option(help="read_once (default) reads the document without knowing the question, query_aware for it."),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Ask a question of one or more documents."""
    from qllm_runtime import console

    if not question.strip():
        raise InvalidRequestError("The question is empty.")
    reading, documents = _load([document, *(options.more or ())], options)
    llm = options.open()
    memory = None if reading is None else _read(llm, reading, documents)
    documents = documents if memory is None else memory.documents
    names = _names(documents)
    asked: dict[str, Any] = {"mode": mode, "system": options.system, **options.asked}
    if json_output:
        import json

        with console.reading() as progress:
            answer = llm.ask(question, memory or documents, progress=progress, **asked)
        utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
        policy = (memory.config if memory else llm.memory).policy
        result = console.as_json(answer, documents, names, options.model, policy)
        print(json.dumps(result, ensure_ascii=not utf8), flush=True)
        return
    answer = console.write_stream(
        lambda progress: llm.stream(question, memory or documents, progress=progress, **asked)
    )
    print(f"\n{console.heading(answer)}")
    console.print_sources(answer.sources, documents, names, whole=False)
    print(f"\n{console.summary(answer)}", flush=True)


@app.command()
@takes_options
def chat(
    document: Annotated[str, typer.Argument(help="File, folder or saved reading to talk about.", show_default=False)],
    *,
    options: Options,
) -> None:
    """Hold a conversation over one reading of the documents.

    One question per line. /sources shows the passages behind the last answer, /new forgets the conversation (not the
    documents), /quit or the end of the input ends it.
    """
    from qllm_runtime import conversation

    given = [document, *(options.more or ())]
    if "-" in given:
        raise DocumentError("`qllm chat` takes its questions from standard input; give the document as a file.")
    if sys.stdin is None:  # closed by the shell
        raise InvalidRequestError(
            "Standard input is closed: there are no questions to read; leave it open or use `qllm ask`."
        )
    reading, documents = _load(given, options)
    llm = options.open()
    memory = _read(llm, reading, documents, options.system)
    conversation.hold_conversation(llm, memory, _names(memory.documents), options.asked)


@app.command()
@partial(takes_options, kind=ReadingOptions)
def read(
    document: Annotated[
        str, typer.Argument(help="File, folder, saved reading, or - for standard input.", show_default=False)
    ],
    *,
    options: ReadingOptions,
    out: Annotated[str, typer.Option(help="Folder to save the reading in.", show_default=False)],
) -> None:
    """Read documents now and save the reading: `qllm ask OUT QUESTION` and `qllm chat OUT` then read nothing again.

    It holds the texts, and the keys and values of every token. A reading that is in the folder already is replaced; as
    DOCUMENT, a saved reading is continued with what --document names.
    """
    from qllm_runtime import console
    from qllm_runtime.reading_folder import check_target

    check_target(Path(out))
    reading, documents = _load([document, *(options.more or ())], options)
    llm = options.open()
    memory = _read(llm, reading, documents, options.system)
    with console.reading("Saving", "layers") as progress:
        memory.save(out, progress=progress)
    size = sum(file.stat().st_size for file in Path(out).iterdir())
    print(f"{out}: {len(memory.documents):,} documents, {memory.n_tokens:,} tokens, {size / 2**20:,.0f} MiB")


@app.command()
def models(
    model: Annotated[list[str] | None, typer.Argument(help="Folders or hub ids to check.", show_default=False)] = None,
) -> None:
    """Tell what is built in, and whether given models are supported and why not.

    Only the configuration of a model is looked at, not its weights. The exit status is 1 if one is not supported, 2
    if one is not found.
    """
    from qllm_runtime import inventory

    if not model:
        inventory.print_builtin()
        return
    quiet()
    status = 0
    for name in model:
        try:
            status = max(status, 0 if inventory.print_support(name) else 1)
        except ModelNotFoundError as error:  # the others have a verdict all the same
            sys.stdout.flush()
            print(f"qllm: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
            status = 2
    if status:
        raise typer.Exit(status)


app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})(bench)


def _load(given: Sequence[str], options: ReadingOptions) -> tuple[Path | None, Sequence[Document]]:
    """The saved reading that the first name on the command line may be, and the documents; those of a folder one by one."""
    from qllm_runtime.folders import load_path
    from qllm_runtime.reading_folder import is_reading

    readings = [name for name in given if is_reading(Path(name))]
    if readings and (len(readings) > 1 or readings[0] != given[0]):
        raise DocumentError(f"{readings[-1]!r} is a saved reading: name one only, ahead of all documents.")
    if readings:
        options.check_layout(readings[0])
    if given.count("-") > 1:
        raise DocumentError("Standard input can be read only once; name - once.")
    for name in given:
        if _ADDRESS.match(name) and not Path(name).exists():
            raise DocumentError(f"{name!r} is an address, and nothing is fetched; save the page and name the file.")
    documents = [document for name in given[len(readings) :] for document in load_path(name)]
    return (Path(readings[0]) if readings else None), documents


def _read(llm: QLLM, reading: Path | None, documents: Sequence[Document], system: str | None = None) -> DocumentMemory:
    """A saved reading, if there is one, and after it what is read now."""
    from qllm_runtime import console

    memory = None
    if reading is not None:
        with console.reading("Loading", "layers") as progress:
            memory = llm.load_memory(reading, progress=progress)
        if not documents:
            return memory
    with console.reading() as progress:
        return llm.read(documents, system=system, after=memory, progress=progress)


def _names(documents: Sequence[Document]) -> list[str]:
    """What sources call the documents; those of a reading saved from Python need not have a file."""
    return [
        str(document.metadata.get("source") or document.title or f"document {number}")
        for number, document in enumerate(documents, 1)
    ]

"""The commands `qllm ask`, `qllm chat`, `qllm models` and `qllm bench`. Nothing heavy is imported before a model is needed."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from qllm_runtime.bench_command import bench
from qllm_runtime.command_options import Options, quiet, takes_options
from qllm_runtime.errors import DocumentError, InvalidRequestError, ModelNotFoundError
from qllm_runtime.types import Document, Mode

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
    document: Annotated[str, typer.Argument(help="File, folder, or - for standard input.", show_default=False)],
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
    names, documents = _load([document, *(options.more or ())])
    llm = options.open()
    asked: dict[str, Any] = {"mode": mode, "system": options.system, **options.asked}
    if json_output:
        import json

        with console.reading() as progress:
            answer = llm.ask(question, documents, progress=progress, **asked)
        utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
        result = console.as_json(answer, documents, names, options.model, llm.memory.policy)
        print(json.dumps(result, ensure_ascii=not utf8), flush=True)
        return
    answer = console.write_stream(lambda progress: llm.stream(question, documents, progress=progress, **asked))
    print(f"\n{console.heading(answer)}")
    console.print_sources(answer.sources, documents, names, whole=False)
    print(f"\n{console.summary(answer)}", flush=True)


@app.command()
@takes_options
def chat(
    document: Annotated[str, typer.Argument(help="File or folder to talk about.", show_default=False)],
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
    names, documents = _load(given)
    conversation.hold(options.open(), documents, names, options.system, options.asked)


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


def _load(given: Sequence[str]) -> tuple[list[str], list[Document]]:
    """What the documents named on the command line are called, and the documents; those of a folder one by one."""
    from qllm_runtime.folders import load_path

    if given.count("-") > 1:
        raise DocumentError("Standard input can be read only once; name - once.")
    for name in given:
        if _ADDRESS.match(name) and not Path(name).exists():
            raise DocumentError(f"{name!r} is an address, and nothing is fetched; save the page and name the file.")
    documents = [document for name in given for document in load_path(name)]
    return [document.metadata["source"] for document in documents], documents

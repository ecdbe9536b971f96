"""`qllm chat`: questions from standard input, answers over one reading."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qllm_runtime import console
from qllm_runtime.errors import QLLMError
from qllm_runtime.types import Answer, Turn

if TYPE_CHECKING:
    from qllm_runtime.document_memory import DocumentMemory
    from qllm_runtime.engine import QLLM

_HELP = "One question per line; /sources, /new, /quit."


def hold_conversation(llm: QLLM, memory: DocumentMemory, names: Sequence[str], options: Mapping[str, Any]) -> None:
    """Answer line after line about what was read; earlier turns are part of the conversation."""
    tty = sys.stdin.isatty()
    if tty:
        print(f"{memory.n_tokens:,} tokens read. {_HELP}")
    history: list[Turn] = []
    answer: Answer | None = None
    for line in _lines(tty):
        if line == "/quit":
            break
        if line == "/sources":
            console.print_sources(answer.sources if answer else (), memory.documents, names, whole=True)
        elif line == "/new":
            history, answer = [], None
        elif line.startswith("/"):
            print(f"Unknown command {line.split()[0]}. {_HELP}")
        else:
            try:
                answer = console.write_stream(
                    lambda _, question=line, turns=tuple(history): llm.stream(  # type: ignore[misc]
                        question, memory, history=turns, **options
                    )
                )
            except QLLMError as error:
                print(f"qllm: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
                continue
            history += [Turn("user", (line,)), Turn("assistant", (answer.text,))]
            console.print_sources(answer.sources[:2], memory.documents, names, whole=False)
            print(console.summary(answer), flush=True)


def _lines(tty: bool) -> Iterator[str]:
    if tty:
        import contextlib

        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (line editing for input)
    while True:
        try:
            line = input("\n> " if tty else "")
        except EOFError:
            if tty:
                print()
            return
        if line.strip():
            yield line.strip()

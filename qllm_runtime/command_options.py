"""The options that `qllm ask`, `qllm chat` and `qllm read` share."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from qllm_runtime.config import MemoryConfig, Policy, Selection, Summary
from qllm_runtime.errors import InvalidRequestError
from qllm_runtime.inventory import BUILTIN

if TYPE_CHECKING:
    from qllm_runtime.engine import QLLM

_MEMORY = ("policy", "n_init", "n_local", "block_size", "topk", "query_weight", "selection", "summary")


def _above_zero(share: float | None) -> float | None:
    if share is not None and not share > 0:
        raise typer.BadParameter(f"{share:g} is not above 0.")
    return share


@dataclass(frozen=True)
class ReadingOptions:
    """Documents, model and memory; what each one does stands in its help."""

    more: Annotated[list[str] | None, typer.Option("--document", help="A further document; may be repeated.")] = None
    model: Annotated[str, typer.Option(help="reader, reader-plain, a folder, or a Hugging Face hub id.")] = "reader"
    revision: Annotated[str | None, typer.Option(help="Revision on the hub.")] = None
    policy: Annotated[
        Policy | None,
        typer.Option(
            help="What stays reachable: qllm and infllm look up blocks, full is dense attention. Default: qllm."
        ),
    ] = None
    system: Annotated[str | None, typer.Option(help="System text ahead of everything.")] = None
    n_init: Annotated[int | None, typer.Option(min=0, help="Initial tokens that stay visible.")] = None
    n_local: Annotated[int | None, typer.Option(min=1, help="Local window in tokens.")] = None
    block_size: Annotated[int | None, typer.Option(min=1, help="Tokens of a memory block.")] = None
    topk: Annotated[int | None, typer.Option("--topk", min=1, help="Blocks looked up at a time.")] = None
    query_weight: Annotated[float | None, typer.Option(min=0, help="Weight of the question in a lookup.")] = None
    selection: Annotated[Selection | None, typer.Option(help="Blocks chosen per layer or per key/value head.")] = None
    summary: Annotated[Summary | None, typer.Option(help="What represents a block in a lookup.")] = None
    memory_config: Annotated[str | None, typer.Option(help="YAML file with memory settings.")] = None
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto"
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto"

    def _chosen(self) -> dict[str, Any]:
        """Settings of the memory that the command line names."""
        return {name: getattr(self, name) for name in _MEMORY if getattr(self, name) is not None}

    def open(self) -> QLLM:
        """Load the model and lay out its memory."""
        chosen = self._chosen()
        stored = None
        if self.memory_config is not None:
            # read once (it may be a pipe) and before the model: an inconsistent file should not cost the time to load one
            stored = MemoryConfig.from_yaml(self.memory_config, **chosen)
        quiet()
        if self.model not in BUILTIN:
            from qllm_runtime.console import looking_for

            looking_for(self.model)
        from qllm_runtime.engine import QLLM

        llm = QLLM.from_pretrained(self.model, revision=self.revision, device=self.device, dtype=self.dtype)
        llm.memory = MemoryConfig(**chosen) if stored is None else stored
        return llm

    def check_layout(self, reading: str) -> None:
        """Refuse settings that a reading on disk cannot take any more.

        Raises:
            InvalidRequestError: One is.
        """
        given = ["memory_config"] if self.memory_config is not None else []
        given += [name for name in ("system", *self._chosen()) if getattr(self, name) is not None]
        if given:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise InvalidRequestError(
                f"{reading!r} was read already, with settings of its own; leave out {names}, or read the documents again."
            )


@dataclass(frozen=True)
class Options(ReadingOptions):
    """`ReadingOptions`, and how answers are written."""

    reread: Annotated[
        bool, typer.Option(help="Read the passages behind a draft of the answer again before it is written.")
    ] = True
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 256
    temperature: Annotated[float, typer.Option(min=0, help="0 always takes the likeliest token.")] = 0.0
    top_p: Annotated[
        float | None, typer.Option(max=1, callback=_above_zero, help="Nucleus sampling: a share above 0.")
    ] = None
    seed: Annotated[int | None, typer.Option(help="Makes sampling reproducible.")] = None
    stop: Annotated[list[str] | None, typer.Option(help="A string that ends the answer; may be repeated.")] = None

    @property
    def asked(self) -> dict[str, Any]:
        """How an answer is written, as the engine takes it."""
        names = ("reread", "max_tokens", "temperature", "top_p", "seed", "stop")
        return {name: getattr(self, name) for name in names}


def takes_options(command: Callable[..., None], kind: type[Any] = Options) -> Callable[..., None]:
    """Give a command that takes `options` one command line option for each field of their dataclass, `kind`."""
    own = inspect.signature(command, eval_str=True)
    hints = get_type_hints(kind, include_extras=True)
    shared = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(kind)
    ]

    def run(**given: Any) -> None:
        options = kind(**{parameter.name: given.pop(parameter.name) for parameter in shared})
        command(**given, options=options)

    kept = [parameter for parameter in own.parameters.values() if parameter.name != "options"]
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = own.replace(parameters=[*kept, *shared])  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in (*kept, *shared)}
    return run


def quiet() -> None:
    """Keep the bars and notices of transformers away."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import huggingface_hub  # importing it sets a level of its own
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger(huggingface_hub.__name__).setLevel(logging.CRITICAL)  # what it says is in the error

"""Readings on disk, as `DocumentMemory.save` writes and `QLLM.load_memory` reads them; `reading_folder` tells the files."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from qllm_runtime.config import MemoryConfig
from qllm_runtime.errors import CancelledError, InvalidRequestError, SavedReadingError
from qllm_runtime.prompt import DocumentSpan, Prompt, build_reading
from qllm_runtime.reading_folder import (
    DESCRIPTION,
    TEXTS,
    TOKENS,
    Reading,
    check_space,
    is_reading,
    layer_file,
    replacing,
)
from qllm_runtime.types import Cancelled, Document, Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qllm_runtime.cache import MemoryCache
    from qllm_runtime.document_memory import DocumentMemory
    from qllm_runtime.inference import Inference

_SAMPLED = 64  # numbers of each weight that tell models apart


def fingerprint(model: PreTrainedModel) -> str:
    """A name for a model's weights and rotary settings; the same on every device."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):  # quantised weights may be buffers
        if weight.is_meta:  # elsewhere, by accelerate
            digest.update(f"{name} {tuple(weight.shape)}".encode())
            continue
        flat = weight.detach().flatten()
        step = max(1, flat.numel() // _SAMPLED)
        sample = flat[::step][:_SAMPLED].cpu()
        digest.update(f"{name} {tuple(weight.shape)} {sample.double().tolist()}".encode())
    rotary = getattr(model.config.get_text_config(), "rope_parameters", None)
    digest.update(json.dumps(rotary, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def write(path: Path, memory: DocumentMemory, inference: Inference, progress: Progress | None) -> None:
    """Write a memory to the folder `path`; a reading that is there already is replaced once the new one is whole.

    Args:
        path: The folder.
        memory: What is written.
        inference: The model that read it, which others leave alone meanwhile.
        progress: Called with (layers written, layers in all).

    Raises:
        SavedReadingError: The folder cannot be written, holds something else, or does not fit on the disk.
        InvalidRequestError: Metadata or template variables that JSON cannot hold, or a memory in faithful mode.
    """
    prompt, cache = memory.contents(inference)
    texts = _documents_as_json(memory.documents)
    description = Reading(
        model=_name(inference.model),
        fingerprint=fingerprint(inference.model),
        dtype=_dtype(inference.model),
        layers=len(cache.layers),
        memory=memory.config.model_dump(mode="json"),
        system=memory.system,
        template_kwargs=_plain(memory.template_kwargs, "template_kwargs"),
        spans=[(span.start, span.end) for span in prompt.document_spans],
    )
    with replacing(path.resolve()) as folder:
        (folder / TEXTS).write_text(texts, encoding="utf-8")
        offsets = {
            f"offsets.{index}": torch.from_numpy(span.offsets).int().contiguous()
            for index, span in enumerate(prompt.document_spans)
        }
        save_file({"ids": torch.from_numpy(prompt.ids), **offsets}, folder / TOKENS)
        n_layers = len(cache.layers)
        alike = Counter(map(cache.kind, range(n_layers)))
        for index in range(n_layers):
            state = {name: tensor.contiguous() for name, tensor in cache.state(index).items()}
            # each layer takes as much as the first of its kind
            check_space(folder, alike.pop(cache.kind(index), 1) * sum(tensor.nbytes for tensor in state.values()))
            save_file(state, folder / layer_file(index))
            if progress is not None:
                progress(index + 1, n_layers)
        (folder / DESCRIPTION).write_text(description.model_dump_json(indent=1), encoding="utf-8")


def load(
    path: Path, tokenizer: Any, inference: Inference, progress: Progress | None, cancelled: Cancelled
) -> DocumentMemory:
    """The memory that was written to the folder `path`; see `QLLM.load_memory`."""
    from qllm_runtime.document_memory import DocumentMemory

    saved = _Saved(path)
    saved.check(inference.model)
    prompt = build_reading(
        tokenizer,
        saved.documents,
        system=saved.system,
        template_kwargs=saved.template_kwargs,
        read=saved.prompt,
        cancelled=cancelled,
    )
    if not np.array_equal(prompt.ids, saved.prompt.ids):
        raise SavedReadingError(
            f"{str(path)!r} was read with another tokenizer or chat template than this model's; read the documents again."
        )
    with inference.request(cancelled):
        cache = inference.cache(saved.config, reserve=len(prompt.ids))
        saved.restore(cache, inference.devices, progress, cancelled)
    return DocumentMemory(saved.documents, saved.system, prompt, cache, inference, saved.config, saved.template_kwargs)


class _Saved:
    """A reading on disk, its small parts loaded.

    Args:
        path: The folder.

    Attributes:
        documents: What was read.
        system: System text ahead of them.
        template_kwargs: Variables of the chat template that were set.
        config: Layout of the memory.
        prompt: What was read, as token ids.

    Raises:
        SavedReadingError: There is no reading, it is damaged, or of another version.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        if not path.is_dir():
            raise SavedReadingError(f"There is no folder {str(path)!r}; save a reading with DocumentMemory.save(path).")
        if not is_reading(path):
            raise SavedReadingError(
                f"The folder {str(path)!r} holds no reading ({DESCRIPTION}); save one with DocumentMemory.save(path)."
            )
        try:
            self._description = Reading.model_validate_json((path / DESCRIPTION).read_text(encoding="utf-8"))
            self.config = MemoryConfig.model_validate(self._description.memory)
            entries = json.loads((path / TEXTS).read_text(encoding="utf-8"))
            self.documents = tuple(Document(**entry) for entry in entries)
            with safe_open(path / TOKENS, framework="pt") as tokens:
                ids = tokens.get_tensor("ids").numpy()
                spans = tuple(
                    DocumentSpan(index, start, end, tokens.get_tensor(f"offsets.{index}").long().numpy())
                    for index, (start, end) in enumerate(self._description.spans)
                )
        except (OSError, ValueError, TypeError, ValidationError, SafetensorError) as error:
            raise self._damaged(error) from error
        if len(spans) != len(self.documents) or not spans:
            raise self._damaged(f"{len(self.documents)} texts, {len(spans)} spans")
        self.prompt = Prompt(ids, (), spans, spans[-1].end)
        self.system = self._description.system
        self.template_kwargs: dict[str, Any] = dict(self._description.template_kwargs)

    def check(self, model: PreTrainedModel) -> None:
        """Check that `model` is the one that read.

        Raises:
            SavedReadingError: It is another one, or has another dtype.
        """
        read_by = self._description
        if read_by.dtype != _dtype(model):
            raise SavedReadingError(
                f"{str(self._path)!r} was read by {read_by.model!r} in {read_by.dtype}, and this model is in {_dtype(model)}; "
                f"load it with dtype={read_by.dtype!r}, or read the documents again."
            )
        if read_by.fingerprint != fingerprint(model):
            raise SavedReadingError(
                f"{str(self._path)!r} was read by {read_by.model!r} with other weights or rotary settings than those of this "
                "model; load that model, or read the documents again."
            )

    def restore(
        self, cache: MemoryCache, devices: Sequence[torch.device], progress: Progress | None, cancelled: Cancelled
    ) -> None:
        """Fill empty memories.

        Args:
            cache: Memories with the layout of `config`, of one row.
            devices: Where each layer's memory is.
            progress: Called with (layers loaded, layers in all).
            cancelled: Asked before every layer.

        Raises:
            SavedReadingError: Files are missing or damaged.
            CancelledError: `cancelled` returned True.
        """
        for index, device in enumerate(devices):
            if cancelled():
                raise CancelledError("Cancelled while loading a reading.")
            try:
                with safe_open(self._path / layer_file(index), framework="pt") as file:
                    state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                cache.restore(index, state, device)
            except (OSError, KeyError, SafetensorError) as error:
                raise self._damaged(error) from error
            if progress is not None:
                progress(index + 1, len(devices))
        seen = {memory.n_seen for memory in cache.memories()}
        if seen != {len(self.prompt.ids)}:
            raise self._damaged(f"its layers hold {sorted(seen)} tokens of {len(self.prompt.ids)}")

    def _damaged(self, reason: object) -> SavedReadingError:
        return SavedReadingError(
            f"The reading in {str(self._path)!r} is damaged, or of another version of this package ({reason}); read the "
            "documents again and save them."
        )


def _name(model: PreTrainedModel) -> str:
    """What people call a model: its hub id, or the folder it was loaded from without what is above it."""
    name = model.name_or_path or type(model).__name__
    return Path(name).name if Path(name).is_dir() else name


def _dtype(model: PreTrainedModel) -> str:
    return str(model.dtype).removeprefix("torch.")


def _documents_as_json(documents: Sequence[Document]) -> str:
    entries = [
        {
            "text": document.text,
            "title": document.title,
            "metadata": _plain(document.metadata, f"metadata of document {index}"),
        }
        for index, document in enumerate(documents)
    ]
    return json.dumps(entries, indent=1)


def _plain(values: Any, what: str) -> dict[str, Any]:
    """Values that come back from JSON as they went in."""
    try:
        found: dict[str, Any] = json.loads(json.dumps(dict(values)))
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(
            f"The {what} cannot be saved as JSON ({error}); leave out what JSON has no form for."
        ) from error
    return found

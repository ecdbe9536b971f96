"""Rows of published files: from a folder, or from the Hugging Face hub through `datasets`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qllm_bench.published.example import DatasetError, Row


def read_rows(path: Path) -> Iterator[Row]:
    """Rows of a JSON Lines file, or of a file that holds one JSON list.

    Raises:
        DatasetError: The file is missing or unreadable, or a line is not a JSON object.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DatasetError(f"Cannot read {path}: {reason}.") from None
    if text.lstrip().startswith("["):
        yield from _listed(path, text)
        return
    found = False
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            found = True
            yield Row(_object(line, f"{path}, line {number}"), f"{path}, line {number}")
    if not found:
        raise DatasetError(f"{path} is empty.")


def _listed(path: Path, text: str) -> Iterator[Row]:
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        raise DatasetError(f"{path}, line {error.lineno}: not JSON ({error.msg}).") from None
    if not items:
        raise DatasetError(f"{path} is empty.")
    for number, item in enumerate(items, start=1):
        where = f"{path}, entry {number}"
        if not isinstance(item, dict):
            raise DatasetError(f"{where}: not a JSON object.")
        yield Row(item, where)


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise DatasetError(f"{where}: not JSON ({error.msg}, column {error.colno}).") from None
    if not isinstance(value, dict):
        raise DatasetError(f"{where}: not a JSON object.")
    return value


def hub_rows(address: str) -> Iterator[Row]:
    """Rows of a published JSON file on the Hugging Face hub; `datasets` keeps a copy.

    Args:
        address: As `datasets` takes it for `data_files`, e.g. `hf://datasets/xinrongzhang2022/InfiniteBench/passkey.jsonl`.

    Raises:
        DatasetError: `datasets` is not installed, or the file cannot be had.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise DatasetError(
            "The published data come from the Hugging Face hub through `datasets`, which is not installed: "
            "`pip install 'qllm-integrations[datasets]'`, or give a folder that has the files with --data."
        ) from None
    try:
        rows = load_dataset("json", data_files=address, split="train")
    except Exception as error:  # network, hub and parser raise their own kinds
        reason = " ".join(str(error).split())
        raise DatasetError(
            f"Cannot load {address}: {type(error).__name__}: {reason} Give a folder that has the files with --data."
        ) from None
    for number, values in enumerate(rows, start=1):
        yield Row(values, f"{address}, row {number}")

"""Arguments of the benchmarks, checked before any work starts."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from qllm_runtime.errors import InvalidRequestError, QLLMError

LONGEST = 4 * 1024 * 1024
_UNITS = {"k": 1024, "m": 1024 * 1024}


class MissingPackageError(QLLMError):
    """A package that a benchmark needs isn't installed."""


def need(package: str, extra: str = "bench") -> None:
    """Refuse to go on without a package.

    Raises:
        MissingPackageError: It isn't installed; the message says what to install.
    """
    if find_spec(package) is None:
        raise MissingPackageError(f"This needs {package}; install it with `pip install 'qllm-integrations[{extra}]'`.")


def split_list(text: str) -> list[str]:
    """The items of a list with commas."""
    return [item.strip() for item in text.split(",") if item.strip()]


def lengths(text: str, least: int = 256, most: int = LONGEST) -> list[int]:
    """Lengths in tokens, e.g. ``512,4k,1M`` (k = 1024, M = 1024 k), ascending.

    Raises:
        InvalidRequestError: Not a number, too small, too large, or none.
    """
    found = set()
    for item in split_list(text):
        unit = _UNITS.get(item[-1].lower(), 1)
        number = item[:-1] if unit > 1 else item
        try:
            tokens = round(float(number) * unit)
        except (ValueError, OverflowError):
            raise InvalidRequestError(f"{item!r} is not a length; write tokens such as 4096, 16k or 1M.") from None
        if not least <= tokens <= most:
            raise InvalidRequestError(f"A length of {item} tokens is out of range: {least:,} to {most:,}.")
        found.add(tokens)
    if not found:
        raise InvalidRequestError("No length was given; write tokens such as 4096,16k,1M.")
    return sorted(found)


def by_length(text: str, wanted: Sequence[int], name: str) -> dict[int, int]:
    """A number for each length: one for all, ``4``, or with others for some, ``4,64k=2,1M=1``.

    Args:
        text: The argument.
        wanted: Lengths in tokens.
        name: Of the option, for messages.

    Raises:
        InvalidRequestError: Not a number or below 1, a length that is not asked for, or one without a number.
    """
    found: dict[int, int] = {}
    for item in split_list(text):
        length, equals, number = item.rpartition("=")
        if not number.strip().isdecimal() or int(number) < 1:
            raise InvalidRequestError(f"{name} must be at least 1, or LENGTH=NUMBER with commas; it is {text!r}.")
        some = lengths(length) if equals else wanted
        if unknown := [short(tokens) for tokens in some if tokens not in wanted]:
            raise InvalidRequestError(f"{name} names a length that is not among --lengths: {', '.join(unknown)}.")
        found |= dict.fromkeys(some, int(number))
    if missing := [short(tokens) for tokens in wanted if tokens not in found]:
        raise InvalidRequestError(
            f"{name} says nothing about {', '.join(missing)}; begin with a number for all lengths."
        )
    return {tokens: found[tokens] for tokens in wanted}


def choices(text: str, known: Sequence[str], what: str) -> list[str]:
    """Items of a list with commas, each one of ``known``, in the order given, once; ``all`` stands for all of them.

    Raises:
        InvalidRequestError: An unknown one, or none.
    """
    items = list(dict.fromkeys(split_list(text)))
    if items == ["all"]:
        return list(known)
    unknown = [item for item in items if item not in known]
    if unknown or not items:
        raise InvalidRequestError(f"Unknown {what} {', '.join(unknown) or '(none)'}; known: {', '.join(known)}.")
    return items


def one(text: str, known: Sequence[str], what: str) -> str:
    """The one item of ``known`` that is named.

    Raises:
        InvalidRequestError: An unknown one, none, or several.
    """
    found = choices(text, known, what)
    if len(found) > 1 or split_list(text) == ["all"]:
        raise InvalidRequestError(f"One {what} is taken at a time, not {text!r}; known: {', '.join(known)}.")
    return found[0]


def at_least(value: int, least: int, name: str) -> int:
    """``value``, refused when it is less than ``least``.

    Raises:
        InvalidRequestError: It is.
    """
    if value < least:
        raise InvalidRequestError(f"{name} must be at least {least}; it is {value}.")
    return value


def short(tokens: int) -> str:
    """A length as people write it: 4k, 1M, 700."""
    for unit, size in (("M", 1024 * 1024), ("k", 1024)):
        if tokens >= size and tokens % size == 0:
            return f"{tokens // size}{unit}"
    return str(tokens)

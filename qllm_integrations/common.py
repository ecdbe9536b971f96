"""What both integrations say in the same way."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable
from difflib import get_close_matches

from pydantic import ValidationError

from qllm_runtime.errors import InvalidConfigError

#: Tokens that one may ask of a policy with constant attention cost; the engine says the same once a model is loaded.
BLOCK_MEMORY_WINDOW = 4 * 1_048_576


def warn_unknown(where: str, given: Iterable[str], known: Collection[str], *, stacklevel: int = 3) -> None:
    """Warn by name about arguments that have no effect, and suggest the one that was meant."""
    for name in given:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(sorted(known))}."
            warnings.warn(
                f"{where} ignores the unknown argument {name!r}{hint}", UserWarning, stacklevel=stacklevel + 1
            )


def invalid_settings(name: str, error: ValidationError) -> InvalidConfigError:
    """The error of a class whose settings pydantic refuses."""
    lines = [f"{'.'.join(map(str, e['loc'])) or 'settings'}: {e['msg']}" for e in error.errors()]
    return InvalidConfigError(f"Invalid settings of {name}: " + "; ".join(lines))

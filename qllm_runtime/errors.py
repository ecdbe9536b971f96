"""Typed errors. Each message says what was wrong and what to do about it."""

from __future__ import annotations


class QLLMError(Exception):
    """Base of every error this package raises on purpose."""


class UnsupportedModelError(QLLMError):
    """The architecture cannot be served; the message names it and the reason."""


class MissingExtraError(QLLMError, ImportError):
    """A package is not installed that only this feature needs; the message says how to install it."""


class ModelNotFoundError(QLLMError):
    """No model under this name, path or hub id could be loaded."""


class InvalidConfigError(QLLMError, ValueError):
    """A memory or sampling setting is out of range or contradicts another one."""


class InvalidRequestError(QLLMError, ValueError):
    """The request cannot be answered as it stands (empty question, no document, unsupported content, ...)."""


class TemplateError(InvalidRequestError):
    """The chat template refuses, drops or repeats a part of the conversation."""


class DocumentError(QLLMError, ValueError):
    """A document is empty, unreadable, binary or not in a supported encoding or format."""


class ContextOverflowError(InvalidRequestError):
    """A question has more tokens than the local window; nothing is ever truncated silently."""


class SavedReadingError(QLLMError):
    """A reading cannot be written to disk, or what is there is damaged or was read by another model."""


class OutOfMemoryError(QLLMError, MemoryError):
    """Host or device memory ran out; the message names the setting that lowers the need."""


class ClosedError(QLLMError):
    """The model or document memory was closed and cannot be used any more."""


class CancelledError(QLLMError):
    """The caller cancelled the request; the model is free for the next one."""

"""Entry of the command line: exit statuses, and one line for whatever goes wrong."""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Sequence

# nothing heavy is imported here: a Ctrl-C must find `run` in charge as early as can be
from qllm_runtime.errors import QLLMError


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns its exit status: 0, 2 for bad input, 130 after Ctrl-C, 1 for anything unforeseen."""
    if sys.stderr is None:  # closed by the shell
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if sys.stdout is None:
        return _complain("standard output is closed: there is nowhere to write an answer; leave it open", 2)
    with warnings.catch_warnings():
        warnings.showwarning = _warn
        return _run(arguments)


def _run(arguments: Sequence[str] | None) -> int:
    try:
        import logging

        for noisy in ("pypdf", "huggingface_hub", "httpx"):  # what they warn of is in the error, in one line
            logging.getLogger(noisy).setLevel(logging.CRITICAL)
        from qllm_runtime.commands import app

        status = app(args=arguments, prog_name="qllm", standalone_mode=False)
        if status == 130:  # what typer makes of a Ctrl-C; older ones raise an Abort
            return _interrupted()
        sys.stdout.flush()
    except QLLMError as error:
        return _complain(str(error), 2)
    except KeyboardInterrupt:
        return _interrupted()
    except (BrokenPipeError, SystemExit):  # the reader of our output has seen enough; typer makes a SystemExit of it
        _discard_output()
        return 141
    except Exception as error:
        if isinstance(error, OSError) and _is_of_output(error):
            _discard_output()
            return _complain(f"cannot write to standard output: {error.strerror or error}", 2)
        if type(error).__name__ == "Abort":
            return _interrupted()
        usage = getattr(error, "format_message", None)  # typer's usage errors, whichever class they are
        if usage is not None:
            if type(error).__name__ == "NoArgsIsHelpError":  # called without anything: the message is the help
                print(usage(), file=sys.stderr)
                return 2
            command = getattr(getattr(error, "ctx", None), "command_path", None) or "qllm"
            return _complain(f"{usage().rstrip('.')}. {_hint(arguments)}Try `{command} --help`.", 2)
        if os.environ.get("QLLM_TRACEBACK"):
            raise
        return _complain(f"unexpected {type(error).__name__}: {error} (QLLM_TRACEBACK=1 shows where)", 1)
    return int(status or 0)


def _hint(arguments: Sequence[str] | None) -> str:
    """How to name a file that looks like an option, if there is one."""
    given = sys.argv[1:] if arguments is None else arguments
    file = next((name for name in given if name.startswith("-") and name != "-" and os.path.exists(name)), None)
    return f"For the file of that name write ./{file}. " if file else ""


def _is_of_output(error: OSError) -> bool:
    """Whether it was standard output that could not be written to."""
    try:
        sys.stdout.flush()  # what cannot leave the buffer fails once more
    except OSError:
        return True
    unbuffered = getattr(sys.stdout, "write_through", False)
    return unbuffered and error.filename is None and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EIO)


def _discard_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    print(f"qllm: warning: {' '.join(str(message).split())}", file=sys.stderr, flush=True)


def _complain(message: str, status: int) -> int:
    print(f"qllm: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return status


def _interrupted() -> int:
    if sys.stderr.isatty():
        print(file=sys.stderr)  # the terminal has shown ^C
    return _complain("interrupted", 130)


def main() -> None:
    """Entry point of the `qllm` command."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    status = run()
    if status in (130, 141):  # a worker thread may be inside the model: leave without waiting for it
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)

"""Every example in a docstring runs; importing stays light."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from llama_index.core.instrumentation import get_dispatcher

import qllm_integrations.llama_index as package
from qllm_runtime import loading
from tests.integrations.llama_index.tiny_model import save_tiny

DOCUMENTED = [
    name
    for name in package.__all__
    if inspect.isclass(cls := getattr(package, name)) and "```python" in (cls.__doc__ or "")
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def test_public_classes_have_examples() -> None:
    events = {"DocumentsReadEvent", "LookupEvent"}
    assert set(DOCUMENTED) == set(package.__all__) - events


@pytest.mark.parametrize("name", DOCUMENTED)
def test_examples(name: str, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "locate", lambda model: tiny)
    monkeypatch.setattr(get_dispatcher(), "event_handlers", [])
    blocks = re.findall(r"```python\n(.*?)```", inspect.getdoc(getattr(package, name)) or "", re.DOTALL)
    exec(compile("\n".join(map(inspect.cleandoc, blocks)), name, "exec"), {"__name__": "example"})


def test_import_is_light() -> None:
    code = (
        "import sys, time, qllm_integrations.llama_index as m\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
        "m.QLLM(); started = time.perf_counter(); m.QLLM(); assert time.perf_counter() - started < 0.005\n"
        "m.QLLM().metadata; m.QLLM().to_payload(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

"""What a chat model shows of itself: imports, repr, traces, cache keys, pickles, profile."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import time
import warnings
from typing import Any

import pytest
from fake_engine_lc import FakeEngine
from ishmael import REPLY
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.load import dumpd, dumps
from langchain_core.messages import HumanMessage

import qllm_integrations.langchain
from qllm_integrations.langchain import ChatQLLM, DocumentQA, QLLMChat
from qllm_runtime.config import MemoryConfig
from qllm_runtime.errors import InvalidRequestError

SECRET = "The treasure lies under the third oak"
BASE = ["language_models.chat_models", "prompts", "tools", "documents", "document_loaders", "output_parsers"]


def test_importing_is_light() -> None:
    program = (
        f"import sys, time; import {', '.join(f'langchain_core.{name}' for name in BASE)}; began = time.process_time();"
        "before = set(sys.modules);"  # old versions of langchain-core load transformers themselves
        "import qllm_integrations.langchain; print(time.process_time() - began,"
        "sorted({'torch', 'transformers', 'llguidance', 'llama_index'} & (set(sys.modules) - before)))"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split(
        maxsplit=1
    )
    assert float(out[0]) < 0.5
    assert out[1].strip() == "[]"


def test_constructing_loads_nothing() -> None:
    began = time.process_time()
    for _ in range(20):
        QLLMChat(model="no/such-model")
    assert (time.process_time() - began) / 20 < 0.005


def test_public_names() -> None:
    names = {"QLLM_STUFF_PROMPT", "ChatQLLM", "DocumentHandle", "DocumentQA", "QLLMChat"}
    assert set(qllm_integrations.langchain.__all__) == names
    assert ChatQLLM is QLLMChat


SETTINGS: list[dict[str, Any]] = [
    {},
    {"model": "other"},
    {"revision": "v2"},
    {"dtype": "float16"},
    {"memory": MemoryConfig()},
    {"memory": MemoryConfig(topk=8)},
    {"memory": MemoryConfig(policy="infllm")},
    {"temperature": 0.5},
    {"max_tokens": 7},
    {"top_p": 0.5},
    {"top_k": 5},
    {"min_p": 0.1},
    {"repetition_penalty": 1.5},
    {"seed": 1},
    {"stop": ["x"]},
    {"stop": ["y"]},
    {"logprobs": True},
    {"top_logprobs": 3},
    {"mode": "read_once"},
    {"file_id": "mem-1"},
    {"template_kwargs": {"enable_thinking": False}},
]


def test_cache_keys_tell_configurations_apart_and_nothing_else() -> None:
    keys = [QLLMChat(**fields)._get_llm_string() for fields in SETTINGS]
    assert len(set(keys)) == len(keys)
    assert keys == [QLLMChat(**fields, show_progress=True)._get_llm_string() for fields in SETTINGS]
    first, second = (QLLMChat.from_engine(FakeEngine())._get_llm_string() for _ in range(2))
    assert first != second  # two models in memory may share a name


def test_a_cache_hits_for_the_same_request_only() -> None:
    cache, engine = InMemoryCache(), FakeEngine()
    llm = QLLMChat.from_engine(engine, cache=cache)
    for options in ({}, {}, {"max_tokens": 3}, {"query": "Which?"}, {"query": "Which?"}):
        llm.invoke("hi", **options)
    assert len(engine.requests) == 3
    assert llm.invoke("hi").text == REPLY


class Trace(BaseCallbackHandler):
    """Everything that traces get to see, as text."""

    def __init__(self) -> None:
        self.seen = ""

    def on_chat_model_start(self, serialized: Any, messages: Any, **kwargs: Any) -> None:
        self.seen += json.dumps([serialized, dumpd(messages), kwargs], default=repr)


def test_documents_behind_a_handle_are_nowhere_to_be_seen() -> None:
    llm = QLLMChat.from_engine(FakeEngine())
    handle = llm.add_documents(f"{SECRET}, said the captain.")
    qa, trace = llm.with_memory(handle), Trace()
    messages = [HumanMessage([handle.block(), {"type": "text", "text": "Where?"}])]
    qa.invoke("Where?", config={"callbacks": [trace]})
    llm.invoke(messages, config={"callbacks": [trace]})
    list(qa.stream("Where?", config={"callbacks": [trace]}))
    shown = [
        trace.seen,
        repr(llm),
        repr(qa),
        repr(handle),
        repr(DocumentQA(llm, handle)),
        dumps(qa),
        repr(qa.with_retry()),
    ]
    shown += [qa._get_llm_string(), json.dumps(qa._get_ls_params()), repr(messages), json.dumps(qa._identifying_params)]
    with pytest.raises(InvalidRequestError) as caught:
        qa.invoke([HumanMessage([{"type": "image", "url": "x"}])])
    shown.append(str(caught.value))
    assert handle.id in trace.seen
    assert not any("treasure" in text for text in shown)


def test_inline_documents_stay_out_of_parameters() -> None:
    trace, llm = Trace(), QLLMChat.from_engine(FakeEngine())
    document = {"type": "text-plain", "mime_type": "text/plain", "text": SECRET}
    llm.invoke([HumanMessage([document, {"type": "text", "text": "Where?"}])], config={"callbacks": [trace]})
    assert "treasure" not in json.dumps(json.loads(trace.seen)[2])
    assert "treasure" not in repr(llm)


def test_secrets_are_masked() -> None:
    llm = QLLMChat(hf_token="hf_secret")
    assert llm.hf_token.get_secret_value() == "hf_secret"
    assert "hf_secret" not in repr(llm) + dumps(llm) + llm._get_llm_string()


def test_pickles_hold_the_configuration_only(tiny_path: str) -> None:
    llm = QLLMChat(model=tiny_path, max_tokens=5, memory=MemoryConfig(n_local=256, exec_block_size=64))
    assert llm.invoke("hi").text == REPLY[:5]
    data = pickle.dumps(llm)
    assert len(data) < 5000
    again = pickle.loads(data)
    assert again.memory == llm.memory
    assert again.invoke("hi").text == REPLY[:5]
    assert copy.deepcopy(llm).invoke("hi").text == REPLY[:5]
    assert llm.bind(stop=["s"]).invoke("hi").text == "I"


def test_handles_refuse_to_be_pickled() -> None:
    llm = QLLMChat.from_engine(FakeEngine())
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(llm.add_documents("Call me Ishmael."))


def test_profile() -> None:
    profile = QLLMChat().profile
    assert profile["max_input_tokens"] == 4 * 1024 * 1024
    assert profile["structured_output"]
    assert profile["tool_calling"]
    assert not profile["image_inputs"]
    assert "max_input_tokens" not in QLLMChat(memory=MemoryConfig(policy="full")).profile


def test_ls_params() -> None:
    params = QLLMChat(model="m", temperature=0.5, stop=["a"])._get_ls_params(stop=["b"], max_tokens=3)
    assert (params["ls_provider"], params["ls_model_name"], params["ls_model_type"]) == ("qllm", "m", "chat")
    assert (params["ls_temperature"], params["ls_max_tokens"], params["ls_stop"]) == (0.5, 3, ["a", "b"])
    assert QLLMChat()._get_ls_params(model="x")["ls_model_name"] == "x"
    if hasattr(QLLMChat, "_add_version"):  # langchain-core 1.5 and newer
        assert "qllm-integrations" in QLLMChat().metadata["lc_versions"]


def test_none_stands_for_the_default() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        QLLMChat(model="m", temperature=0, max_tokens=None, timeout=None, max_retries=2)
        names = [name for name in QLLMChat.model_fields if name not in ("shared", "profile", "metadata")]
        default, given = QLLMChat(), QLLMChat(**dict.fromkeys(names))
    assert {name: getattr(given, name) for name in names} == {name: getattr(default, name) for name in names}
    assert given.max_tokens == 256


def test_configurable_fields(tiny_path: str) -> None:
    from langchain_core.runnables import ConfigurableField

    llm = QLLMChat(model=tiny_path).configurable_fields(max_tokens=ConfigurableField(id="n"))
    assert llm.with_config(configurable={"n": 3}).invoke("hi").text == REPLY[:3]


def test_configurable_fields_keep_the_engine_and_its_memories() -> None:
    from langchain_core.runnables import ConfigurableField

    engine = FakeEngine()
    llm = QLLMChat.from_engine(engine)
    handle = llm.add_documents("Call me Ishmael.")
    for chat in (llm, llm.with_memory(handle)):
        short = chat.configurable_fields(max_tokens=ConfigurableField(id="n")).with_config(configurable={"n": 3})
        assert short.invoke("hi").text == REPLY[:3]
    assert [call["memory"] for call in engine.requests] == [None, handle.memory]
    assert "State" not in repr(llm) + dumps(llm) + llm._get_llm_string()

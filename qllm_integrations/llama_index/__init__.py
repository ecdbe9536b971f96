"""Q-LLM for LlamaIndex: a language model that reads whole documents, an index without splitter, and engines over both.

Importing this loads neither torch nor transformers; they come with the first answer.
"""

from __future__ import annotations

from qllm_integrations.llama_index.chat_engine import WholeDocumentChatEngine
from qllm_integrations.llama_index.events import DocumentsReadEvent, LookupEvent, ReadingProgressEvent
from qllm_integrations.llama_index.index import WholeDocumentIndex
from qllm_integrations.llama_index.llm import QLLM
from qllm_integrations.llama_index.query_engine import WholeDocumentQueryEngine
from qllm_integrations.llama_index.retriever import LookupRetriever
from qllm_integrations.llama_index.synthesizer import QLLMSynthesizer

__all__ = [
    "QLLM",
    "DocumentsReadEvent",
    "LookupEvent",
    "LookupRetriever",
    "QLLMSynthesizer",
    "ReadingProgressEvent",
    "WholeDocumentChatEngine",
    "WholeDocumentIndex",
    "WholeDocumentQueryEngine",
]

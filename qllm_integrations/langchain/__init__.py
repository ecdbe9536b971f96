"""LangChain over whole documents: `QLLMChat` and what belongs to it. Importing loads neither torch nor transformers."""

from qllm_integrations.langchain.chat import ChatQLLM, QLLMChat
from qllm_integrations.langchain.memory import DocumentHandle
from qllm_integrations.langchain.qa import QLLM_STUFF_PROMPT, DocumentQA

__all__ = ["QLLM_STUFF_PROMPT", "ChatQLLM", "DocumentHandle", "DocumentQA", "QLLMChat"]

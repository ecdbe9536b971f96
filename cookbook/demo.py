"""Three questions about a document of more than 100,000 tokens, through LangChain, on whatever this machine has.

Run it with `make demo`, or `python cookbook/demo.py` where the package is installed with its extra `langchain`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from langchain_core.documents import Document
from langchain_core.messages import AIMessageChunk, HumanMessage
from langchain_core.messages.content import create_plaintext_block

from qllm_integrations.langchain import QLLMChat
from qllm_runtime.samples import sample_document

KINDS = ("What is the code", "What is the job", "What is the special magic number")


def answer(llm: QLLMChat, number: int, question: str, expected: str, document: Mapping[str, Any]) -> None:
    """Stream one answer, then show where it was read."""
    print(f"\nQuestion {number}: {question}")
    whole: AIMessageChunk | None = None
    for chunk in llm.stream([HumanMessage([document, {"type": "text", "text": question}])]):
        print(chunk.text, end="", flush=True)
        whole = chunk if whole is None else whole + chunk
    assert whole is not None
    right = whole.text.strip() == expected
    print(f"   {'(correct)' if right else f'(wrong; expected: {expected})'}")
    citations = [note for block in whole.content_blocks for note in block.get("annotations", [])]
    print("  Read from")
    for citation in citations[:3]:
        place = citation["extras"]
        span = f"characters {place['start_char_index']}-{place['end_char_index']}"
        print(f"    {span} ({place['score']:.0%} of the attention): {' '.join(citation['cited_text'].split())[:160]}")
    usage, timings = whole.usage_metadata, whole.response_metadata["qllm"]["timings"]
    assert usage is not None
    before = (usage.get("input_token_details") or {}).get("cache_read", 0)
    read = usage["input_tokens"] - before
    print(
        f"  Read {read:,} tokens at {timings['read_tokens_per_s']:,.0f} tokens/s"
        + (f" ({before:,} had been read before)" if before else "")
        + f", wrote {usage['output_tokens']} at {timings['decode_tokens_per_s']:,.0f} tokens/s,"
        f" peak memory {timings['peak_memory_bytes'] / 2**20:,.0f} MiB"
    )


def main() -> None:
    """Ask once with the document in the message, then twice of a document that is read once."""
    text, facts = sample_document(seed=0)
    # kinds of facts that the small reader is best at; its card has them all
    questions = [next(fact for fact in facts if fact[0].startswith(kind)) for kind in KINDS]
    llm = QLLMChat(model="reader", max_tokens=64, show_progress=True)
    print(f"A story of {len(text):,} characters, {llm.get_num_tokens(text):,} tokens, with {len(facts)} facts in it.")

    document = create_plaintext_block(text, title="story.txt")
    print("\nThe document is part of the message:")
    answer(llm, 1, *questions[0], document)

    print("\nThe document is read once for any number of questions:")
    with llm.add_documents(Document(page_content=text, metadata={"title": "story.txt"})) as handle:
        for number, (question, expected) in enumerate(questions[1:], 2):
            answer(llm, number, question, expected, handle.block())


if __name__ == "__main__":
    main()

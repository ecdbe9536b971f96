"""`qllm bench rag`: its documents, its retrievers, and the command."""

import json
import random
import re
import shutil

import pytest
import torch
from langchain_core.documents import Document
from langchain_text_splitters import RecursiveCharacterTextSplitter

from qllm_bench.questions.data import Case, Prose
from qllm_bench.rag_questions import FAMILIES, make_document
from qllm_bench.rag_systems import Lexical, MeanPooled, Perfect, Vectors, covered, placed
from qllm_runtime.cli import run
from qllm_runtime.samples import story

PROSE = Prose.of("\n\n".join(story(random.Random(1), 20_000)))


def document(seed=0, families=FAMILIES, n_chars=6_000):
    return make_document(random.Random(seed), PROSE, n_chars, families, 2)


def chunked(text, size=40):
    splitter = RecursiveCharacterTextSplitter(
        chunk_size=size, chunk_overlap=size // 4, length_function=lambda text: len(text.split())
    )
    return placed(text, splitter.split_text(text))


# ------------------------------------------------------------------ documents


def test_a_document_has_a_question_of_every_family_and_the_statements_it_rests_on():
    cases = document()
    assert [case.family for case in cases] == list(FAMILIES)
    assert len({case.document for case in cases}) == 1
    for case in cases:
        statements = [case.document[a:b] for a, b in case.spans]
        assert bool(statements) == (case.family != "absent")
        assert all(any(value in s for s in statements) for value in case.values)
        assert len(statements) == {"two_hop": 2, "absent": 0}.get(case.family, max(1, len(case.values)))
    assert document(0) == cases and document(1) != cases


def test_reworded_facts_share_the_subject_and_no_other_word():
    for seed in range(30):
        for case in document(seed, ["paraphrase", "common"], 500):
            statement, question = (
                set(re.findall(r"\b[a-z]{5,}\b", text))
                for text in (case.document[slice(*case.spans[0])], case.question)
            )
            # a subject may be a word or two in lower case ("the copper kettle"); the templates add none
            assert len(statement & question) <= 2


def test_common_subjects_are_words_of_the_prose():
    counts = []
    for seed in range(20):
        (case,) = document(seed, ["common"], 6_000)
        outside = case.document.replace(case.document[slice(*case.spans[0])], "")
        noun = re.search(r"[Tt]he (\w+)", case.document[slice(*case.spans[0])])[1]
        counts.append(len(re.findall(rf"\b{noun}\b", outside)))
    assert sum(count > 0 for count in counts) > 15


# ------------------------------------------------------------------ retrievers


def test_chunks_know_their_place_and_cover_the_document():
    text = document()[0].document
    chunks = chunked(text)
    starts = [chunk.metadata["start_index"] for chunk in chunks]
    assert starts == sorted(set(starts)) and len(chunks) > 20
    assert all(text.startswith(c.page_content, a) for c, a in zip(chunks, starts, strict=True))
    assert covered(Case(text, "", "", (), "", ((0, len(text)),)), chunks)


def test_bm25_finds_a_rare_name_and_perfect_retrieval_finds_everything():
    cases = {case.family: case for case in document()}
    chunks = chunked(cases["kv"].document)
    lexical, perfect = Lexical(chunks), Perfect(chunks)
    key = re.search(r'"([^"]+)"', cases["kv"].document[slice(*cases["kv"].spans[0])])[1]
    case = Case(cases["kv"].document, f"What is the value of {key}?", "", (), "kv", cases["kv"].spans)
    assert covered(case, lexical.rank(case, 4))
    for case in cases.values():
        ranked = perfect.rank(case, 64)
        assert len({c.metadata["start_index"] for c in ranked}) == len(ranked)
        assert covered(case, ranked[: 2 * len(case.spans)])


def test_covered_needs_every_character_of_every_statement():
    text = "One two three. Four five six. Seven."
    case = Case(text, "", "", (), "multi", ((0, 14), (15, 29)))

    def chunk(a, b):
        return Document(text[a:b], metadata={"start_index": a})

    assert covered(case, [chunk(15, 36), chunk(0, 14)])
    assert covered(case, [chunk(0, 7), chunk(8, 29)])  # the splitter drops the white space between
    assert not covered(case, [chunk(0, 14)])
    assert not covered(case, [chunk(0, 14), chunk(16, 29)])
    assert not covered(case, [])


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A tiny BERT of random weights with a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", *["the", "a", "cat", "dog", "house", "sat", "ran", "in", "on", "old", "red"]]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("tiny-encoder")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=32,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


def test_embeddings_average_the_words_whatever_stands_beside_them_in_the_batch(encoder):
    model = MeanPooled(str(encoder))
    together = torch.tensor(model.embed_documents(["the cat sat", "a dog ran in the old red house " * 9]))
    alone = torch.tensor(model.embed_query("the cat sat"))
    assert torch.allclose(together[0], alone, atol=1e-5)
    assert torch.allclose(together.norm(dim=-1), torch.ones(2), atol=1e-5)
    texts = ["the cat sat on the house", "a dog ran", "an old red house"]
    store = Vectors([Document(t, metadata={"start_index": i}) for i, t in enumerate(texts)], model)
    assert store.rank(Case("", "a dog ran", "", (), "", ()), 1)[0].page_content == "a dog ran"


def test_models_of_one_name_and_other_weights_have_rows_of_their_own(encoder, tmp_path):
    from transformers import BertModel

    other = tmp_path / encoder.name
    shutil.copytree(encoder, other)
    model = BertModel.from_pretrained(other)
    torch.nn.init.normal_(model.embeddings.word_embeddings.weight)
    model.save_pretrained(other)
    names = [MeanPooled(str(folder)).name for folder in (encoder, other)]
    assert names[0] != names[1] and all(name.startswith(encoder.name) for name in names)


# ------------------------------------------------------------------ the command


def bench(*arguments):
    return run(["bench", "rag", *map(str, arguments)])


def rows(path):
    return [row for row in map(json.loads, path.read_text().splitlines()) if "key" in row]


def test_the_same_questions_are_asked_of_every_system(tmp_path, capsys, encoder):
    common = (
        "--lengths", "1k", "--documents", 1, "--distractors", 1, "--families", "magic,two_hop,absent", "--chunks", "48",
        "--embeddings", encoder, "--out", tmp_path,
    )  # fmt: skip
    assert bench(*common, "--order", "last") == 0
    found = rows(tmp_path / "rag.jsonl")
    names = ["whole, read once", "bm25, 48", f"{MeanPooled(str(encoder)).name}, 48", "perfect, 48"]
    assert [row["system"] for row in found] == [name for name in names for _ in range(3)]
    for n, family in enumerate(("magic", "two_hop", "absent")):
        same = [row for row in found if row["family"] == family]
        assert len({(row["question"], row["expected"]) for row in same}) == 1
        assert same[0]["hit"] is None and 900 < same[0]["prompt_tokens"] <= 1024
        for row in same[1:]:
            assert (row["hit"] is None) == (family == "absent")
            assert 250 < row["prompt_tokens"] <= 512 - 80
        assert all((row["index_s"] is not None) == (n == 0) for row in same)
        assert same[-1]["hit"] in (True, None)
    assert bench(*common, "--order", "last,reread,both") == 0
    assert rows(tmp_path / "rag.jsonl")[: len(found)] == found
    assert "12 of 18 cases are done already" in capsys.readouterr().err
    report = json.loads((tmp_path / "rag.json").read_text())
    assert {c["system"] for c in report["hits"]} == set(names[1:])
    assert {c["system"] for c in report["overall"]} == {
        *names,
        "whole, passages read again",
        "whole, read for the question",
    }
    for name in ("rag_family.png", "rag_length.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--order", "first"), "Unknown order first; known: last, reread, both, both-reread"),
        (("--split", "development,test"), "One split is taken at a time, not 'development,test'"),
        (("--chunks", "8"), "--chunks takes sizes of at least 16 tokens"),
        (("--chunks", "64,x"), "--chunks takes sizes of at least 16 tokens"),
        (("--chunks", "400"), "choose smaller --chunks"),
        (("--families", "poems"), "Unknown family poems"),
        (("--embeddings", "/nowhere/model"), "Cannot load the embedding model '/nowhere/model'"),
        (("--lengths", "256"), "do not fit 256 tokens; raise --lengths"),
        (("--n-local", "8"), "the local window of 'qllm' has 8; raise --n-local"),
        (("--text", "/nowhere"), "'/nowhere' is not a folder"),
    ],
)
def test_bad_input_is_one_line_before_any_work(tmp_path, capsys, arguments, message):
    assert bench(*arguments, "--out", tmp_path / "out") == 2
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and not out
    assert not (tmp_path / "out").exists()

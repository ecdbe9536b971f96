"""From attention mass to passages."""

import time

import numpy as np
import pytest

from qllm_runtime.prompt import DocumentSpan, Prompt
from qllm_runtime.sources import _separable, in_order, passages, surroundings, trace_back
from qllm_runtime.types import Document, Source

PROSE = "The rain fell in torrents over the town. Nobody was abroad, and the lamps burned low in the square.\r\n" * 60


def prompt_of(*documents: Document, width: int = 4):
    """A prompt whose tokens are runs of `width` characters, with five template tokens around every document."""
    spans, position = [], 5
    for index, document in enumerate(documents):
        starts = np.arange(0, len(document.text), width)
        offsets = np.stack([starts, np.minimum(starts + width, len(document.text))], axis=1)
        spans.append(DocumentSpan(index, position, position + len(starts), offsets))
        position += len(starts) + 5
    return Prompt(np.zeros(position, np.int64), (), tuple(spans), spans[-1].end)


def mass_on(prompt, document, *needles, weight=1.0, noise=0.0, index=0):
    rng = np.random.default_rng(0)
    mass = rng.random(len(prompt.ids)) * noise
    mass[:5] = 50.0  # the sink of the prompt's first tokens
    span = prompt.document_spans[index]
    for needle in needles:
        start = document.text.index(needle)
        inside = (span.offsets[:, 1] > start) & (span.offsets[:, 0] < start + len(needle))
        mass[span.start : span.end][inside] += weight
    return mass


def check(sources, documents):
    assert all(s.text == documents[s.document].text[s.start : s.end] and s.text.strip() == s.text for s in sources)
    scores = [source.score for source in sources]
    assert scores == sorted(scores, reverse=True)
    assert 0 < sum(scores) <= 1 + 1e-9
    for a in sources:
        for b in sources:
            assert a is b or a.document != b.document or a.end <= b.start or b.end <= a.start


def test_the_sentence_around_the_peak():
    fact = "The pass key of Mr. Vane is 71432."
    document = Document(PROSE + fact + " " + PROSE, "a.txt")
    prompt = prompt_of(document, width=2)
    sources = passages(mass_on(prompt, document, "71432", noise=0.001), prompt, [document])
    assert sources[0].text == fact
    assert (sources[0].document, sources[0].title) == (0, "a.txt")
    assert sources[0].score > 0.4
    check(sources, [document])


def test_white_space_is_no_passage():
    blank = " " * 3000
    document = Document(PROSE + "\n" + blank + "\ufeff\n" + blank + "\n" + PROSE)
    prompt = prompt_of(document, width=2)
    first = document.text.index(blank)
    mass = np.zeros(len(prompt.ids))
    inside = list(prompt.document_spans[0].tokens(first, first + 6000))
    mass[inside] = 1.0
    assert all(source.text.strip() for source in passages(mass, prompt, [document]))
    assert surroundings(inside[100], inside[120], prompt, [document]) == []


def test_white_space_does_not_hide_what_stands_beside_it():
    text = "The rain fell. The key is 4711. \n \n"
    document = Document(text)
    prompt = prompt_of(document, width=1)
    mass = mass_on(prompt, document, "4711", weight=0.2)
    mass[prompt.document_spans[0].end - 2] = 8.0
    (source,) = passages(mass, prompt, [document])
    assert source.text == "The key is 4711."


def test_several_documents_best_first():
    documents = [Document(PROSE + f"Fact {i} is here." + " " + PROSE) for i in range(3)]
    prompt = prompt_of(*documents)
    mass = sum(
        mass_on(prompt, documents[i], f"Fact {i} is", weight=weight, index=i) for i, weight in enumerate([1, 4, 2])
    )
    sources = passages(mass, prompt, documents)
    assert [(s.document, s.text) for s in sources] == [
        (1, "Fact 1 is here."),
        (2, "Fact 2 is here."),
        (0, "Fact 0 is here."),
    ]
    assert sources[0].score == pytest.approx(4 / 7, abs=0.05)
    check(sources, documents)


def test_recent_text_does_not_come_first_for_being_near():
    """The end of a text lies in the window, where all of it is seen; a passage there holds more, the fact stands out more."""
    last = "He closed the door behind him and went down to the river where the boats lay in the dark all night."
    document = Document(PROSE + "The code is 4711. " + PROSE + last + " Nobody saw it." * 60)
    prompt = prompt_of(document)
    span = prompt.document_spans[0]
    mass = mass_on(prompt, document, "The code is 4711.", weight=15.0) + mass_on(prompt, document, last, weight=2.5)
    mass[span.end - 600 : span.end] += np.linspace(0, 2, 600)
    sources = passages(mass, prompt, [document])
    assert sources[0].text == "The code is 4711."
    assert sources[1].text.startswith(last)
    check(sources, [document])


def test_neighbours_are_merged():
    document = Document(PROSE + "One fact is here. Another fact is there. " + PROSE)
    prompt = prompt_of(document)
    sources = passages(mass_on(prompt, document, "One fact", "Another fact"), prompt, [document])
    assert [s.text for s in sources] == ["One fact is here. Another fact is there."]
    assert sources[0].score == pytest.approx(1)


def test_lines_where_there_are_no_sentences():
    lines = [f'{{"key-{i}": "value-{i * 7919 % 1000}"}}' for i in range(400)]
    document = Document("\n".join(lines))
    prompt = prompt_of(document)
    sources = passages(mass_on(prompt, document, '"key-200": "value'), prompt, [document])
    assert sources[0].text == lines[200]


def test_text_without_any_boundary():
    document = Document("x" * 5000)
    prompt = prompt_of(document)
    mass = np.zeros(len(prompt.ids))
    mass[500] = 1
    (source,) = passages(mass, prompt, [document])
    assert source.start <= (500 - 5) * 4 < source.end


def test_diffuse_mass_gives_few_passages():
    document = Document(PROSE)
    prompt = prompt_of(document)
    for noise in (0.0, 0.01):
        mass = np.full(len(prompt.ids), 1.0) + mass_on(prompt, document, noise=noise)
        sources = passages(mass, prompt, [document])
        assert 1 <= len(sources) <= 2
        check(sources, [document])


def test_block_wise_mass():
    document = Document(PROSE + "The pass key is 71432. " + PROSE)
    prompt = prompt_of(document)
    token = prompt.document_spans[0].start + document.text.index("71432") // 4
    mass = np.zeros(len(prompt.ids))
    start = token // 64 * 64
    mass[start : start + 64] = 1
    sources = passages(mass, prompt, [document])
    assert sum(s.score for s in sources) > 0.9
    assert any("71432" in s.text for s in sources)


def test_a_token_that_collects_attention_does_not_come_before_a_sentence():
    document = Document(PROSE + "One fact is here. " + PROSE + "Nothing is said, at all. " + PROSE)
    prompt = prompt_of(document)
    span = prompt.document_spans[0]
    mass = mass_on(prompt, document, "One fact is here.")
    mass[span.start + document.text.index("said,") // 4] = 9.0  # more than all of that sentence
    sources = passages(mass, prompt, [document])
    assert sources[0].text == "One fact is here."


def test_what_hardly_stands_out_is_no_passage():
    document = Document(PROSE + "One fact is here. " + PROSE + "Another is hinted at. " + PROSE)
    prompt = prompt_of(document)
    for weight, n in ((0.5, 2), (0.1, 1)):
        mass = mass_on(prompt, document, "One fact is") + mass_on(prompt, document, "Another is", weight=weight)
        mass[:5] = 50.0
        assert len(passages(mass, prompt, [document])) == n


def test_those_that_hold_most_are_kept():
    """Amid much attention a passage holds more of it than one that stands out further by itself."""
    alone, amid = facts = ("One fact is here.", "Another is there.")
    document = Document(PROSE + alone + " " + PROSE + amid + " " + PROSE)
    prompt = prompt_of(document, width=1)
    mass = sum(mass_on(prompt, document, fact, weight=weight) for fact, weight in zip(facts, (5, 4.5), strict=True))
    place = document.text.index(amid)
    mass[prompt.document_spans[0].tokens(place - 1500, place + 1500)] += 1.0
    first, second = passages(mass, prompt, [document], limit=2)
    assert (first.text, second.text) == facts
    assert [source.text for source in passages(mass, prompt, [document], limit=1)] == [amid]


def test_abbreviations_end_no_sentence_and_texts_begin_without_one():
    fact = "The pass key is kept by Mr. Vane and by Dr. Hall in town."
    document = Document(fact + " " + PROSE)
    prompt = prompt_of(document, width=1)
    (source,) = passages(mass_on(prompt, document, "kept by Mr."), prompt, [document])
    assert source.text == fact
    title = "A\nB keeps the key"
    document = Document(title + ". " + PROSE)
    (source,) = passages(mass_on(prompt, document, "keeps"), prompt_of(document, width=1), [document])
    assert source.text == title + "."


def test_passages_within_others_are_no_end():
    text = "One came. Two went. Three stayed."
    outer, inner = (Source(0, None, 0, end, 0.5, text[:end]) for end in (len(text), len("One came.")))
    assert in_order([outer, inner], [Document(text)]) == (outer,)


def test_mass_of_a_passage_moves_to_the_tokens_its_own_begin_in():
    document = Document(PROSE)
    excerpt = Source(0, None, 102, 202, 1.0, PROSE[102:202])
    prompt = prompt_of(document, Document(excerpt.text))
    home, again = prompt.document_spans
    mass = np.zeros(len(prompt.ids))
    mass[again.start + 3] = 10.0  # characters 114 to 118, of tokens 112 to 116 and 116 to 120
    moved, _ = trace_back(mass, prompt, [excerpt])
    assert np.flatnonzero(moved[home.start : home.end]).tolist() == [112 // 4]


def test_at_most_limit():
    facts = [f"Fact {i} is here." for i in range(9)]
    document = Document("".join(fact + " " + PROSE for fact in facts))
    prompt = prompt_of(document)
    mass = mass_on(prompt, document, *facts)
    assert len(passages(mass, prompt, [document])) == 5
    assert {s.text for s in passages(mass, prompt, [document], limit=20)} == set(facts)
    assert passages(mass, prompt, [document], limit=0) == ()


def test_no_mass_no_passages():
    document = Document(PROSE)
    prompt = prompt_of(document)
    mass = np.zeros(len(prompt.ids))
    mass[:5] = 1
    assert passages(mass, prompt, [document]) == ()
    assert passages(np.full(len(prompt.ids), np.nan), prompt, [document]) == ()


@pytest.mark.parametrize("glyph", ["👩‍🚀", "🇩🇪", "e\u0301", "👍🏽", "❤️", "ab\r\n", "🏴\U000e0067\U000e0062\U000e007f"])
def test_no_glyph_is_cut(glyph):
    document = Document(glyph * 400)
    for width in (1, 2, 3, 5):
        prompt = prompt_of(document, width=width)
        for place in range(40, 48):
            mass = np.zeros(len(prompt.ids))
            mass[prompt.document_spans[0].start + place] = 1
            sources = passages(mass, prompt, [document])
            assert sources
            for source in sources:
                assert source.start % len(glyph) == 0
                assert source.end % len(glyph) == len(glyph.rstrip()) % len(glyph)
                assert source.text == document.text[source.start : source.end]


def test_a_million_tokens_take_no_time():
    document = Document(PROSE * 700)
    prompt = prompt_of(document)
    assert len(prompt.ids) > 1_000_000
    mass = np.random.default_rng(0).random(len(prompt.ids))
    start = time.process_time()
    passages(mass, prompt, [document])
    assert time.process_time() - start < 3


@pytest.mark.parametrize(
    "character",
    [
        "\u1112\u1161\u11ab",
        "\u0915\u094d\u0937",
        "\r\n",
        "1\ufe0f\u20e3",
        "\uff76\uff9e",
        "👩\u200d🚀",
        "e\u0301",
        "🇫🇷",
    ],
)
def test_characters_as_readers_see_them_are_whole(character: str) -> None:
    text = f"It rained.{character}{character}x"
    cuts = [index for index in range(10, len(text)) if _separable(text, index)]
    assert cuts == [10, 10 + len(character), 10 + 2 * len(character)]

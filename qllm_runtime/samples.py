"""A long story made on the spot, with facts hidden in it and questions about them: for the demo, tests and benchmarks.

Everything is drawn from one seed, so a seed always gives the same text on every machine.
"""

# Word lists read better as words than as lists of strings.
# ruff: noqa: SIM905, E501

from __future__ import annotations

import random

_FIRST = (
    "Adela Bertram Cecily Dorian Elspeth Fergus Greta Hector Imogen Jocelyn Katrin Lionel Marjorie Nicholas Odette "
    "Percival Rosalind Stefan Tabitha Ulric Verena Wilfred Yolanda Zachary Agnes Barnaby Cordelia Desmond Euphemia Gideon"
).split()
_START = "Ash Bar Cor Dun El Fal Gar Hol Ing Kel Lor Mar Nor Or Pen Quar Ros Sel Tor Ul Ven Wil Yar Zel Bram Crest Drow Fenn Grim Hart".split()
_END = "ben by combe den field ford gate ham holt ley mere mond mouth ness rick ridge stead stoke ton wick worth vale".split()
_ADJ = (
    "narrow quiet crooked pale cheerful weary solemn dusty broad silent golden damp ancient curious gentle stubborn distant "
    "familiar bitter sudden faint heavy honest plain wooden shallow steep bright grey ragged polite hollow patient rough"
).split()
_NOUN = (
    "lantern harbour letter kitchen garden bridge market window river staircase carriage orchard chapel ledger umbrella "
    "fiddle mill bakery museum theatre meadow cellar tower workshop library ferry barn telescope compass blanket teapot "
    "newspaper piano hedge fountain bell map chimney fence boat lamp mirror table road stove attic school shop stable"
).split()
_PERSON = (
    "baker sailor widow doctor schoolmaster gardener clerk printer fisherman stranger miller captain nurse porter tailor "
    "carpenter magistrate painter shepherd innkeeper neighbour postman grocer musician surveyor judge"
).split()
_VERB = (
    "watched followed remembered ignored repaired described admired mistrusted praised forgot carried borrowed mentioned "
    "painted measured avoided sold bought questioned visited"
).split()
_ABSTRACT = "patience weather silence gratitude rumour hope doubt pride kindness habit luck fear truth memory duty haste".split()
_WHEN = (
    "In the morning|Towards evening|Before supper|A week later|On the first day of spring|After the storm|At noon|"
    "Late in the autumn|That same night|When the bells had stopped|Some years before|As soon as it was light|By and by|"
    "On Thursday|During the long winter|Once the guests had gone"
).split("|")
_SENTENCES = (
    "{when}, {n} {v} the {a} {o} near the {o}.",
    "The {a} {p} {v} the {o}, and nobody in {t} thought it strange.",
    '"I have never seen a {o} so {a}," said {n}, "and I hope I never shall again."',
    "It was a {a} day, with little {b} and a great deal of rain on the {o}.",
    "{n} had always believed that {b} was worth more than a {a} {o}.",
    "There stood, between the {o} and the {o}, a {a} {o} which belonged to the {p}.",
    "{when} the {p} came down from {t} with a {o} under one arm.",
    '"Do you suppose," asked the {p}, "that {n} ever {v} the {o}?"',
    "Nothing could be heard but the {o} and, far away, the {a} voice of a {p}.",
    "The road to {t} was {a}, and the {o} by the side of it was {a} too.",
    "{n} and {n} talked of {b} until the {o} grew cold.",
    "If the {p} had shown more {b}, the {o} would still be where it was.",
    "Everyone agreed that the {a} {o} was no place for a {p}.",
    "{when}, without a word, {n} put the {o} back beside the {o} and went out.",
    "What the {p} wanted was not {b} but a {a} {o} and somebody to share it with.",
    "The windows of the {o} looked upon {t}, where the {a} roofs shone after the rain.",
    "{n} laughed, though there was more {b} than mirth in it.",
    '"You will find the {o} exactly as you left it," said the {p}, and {v} the {o} with a {a} smile.',
    "A {a} {p} and a {a} {p} had quarrelled about a {o} for as long as {t} could remember.",
    "The {o} had been {a} once; now it served the {p} as a {o}.",
    "{when} there was no {b} left in the house, only a {a} {o} and the smell of the {o}.",
    "They walked past the {o}, the {o} and the {a} {o}, and did not stop before {t}.",
    "To tell the truth, {n} {v} the {p} a good deal less than the {o}.",
    "No {p} in {t} would have exchanged that {a} {o} for all the {b} in the world.",
    "The instructions were simple: keep the {o} dry, keep the {o} {a}, and never trust a {a} {p}.",
    "Of the {b} of the {p} much was said and little was known.",
    "First {n} {v} the {o}; then, with some {b}, the {p} {v} it as well.",
    "Even so, it took {n} most of the day to find the {a} {o} in {t}.",
    "Behind the {o} the ground was {a}, and the {o} leaned to one side.",
    '"{b_cap} is a {a} thing," thought {n}, and closed the {o}.',
)  # fmt: skip
_ROLES = "owner colour price weight motto founder password height keeper symbol capital depth".split()


def _name(rng: random.Random) -> str:
    return rng.choice(_FIRST)


def _town(rng: random.Random) -> str:
    return rng.choice(_START) + rng.choice(_END)


def article(word: str) -> str:
    """The indefinite article ahead of a word."""
    return "an" if word[0] in "aeiou" or word == "honest" else "a"


def _sentence(rng: random.Random, names: list[str], towns: list[str]) -> str:
    out = rng.choice(_SENTENCES)
    while "{" in out:
        before, rest = out.split("{", 1)
        slot, after = rest.split("}", 1)
        if slot == "b_cap":
            word = rng.choice(_ABSTRACT).capitalize()
        elif slot in ("n", "t"):
            word = rng.choice(names if slot == "n" else towns)
        else:
            pools = {"when": _WHEN, "a": _ADJ, "o": _NOUN, "p": _PERSON, "v": _VERB, "b": _ABSTRACT}
            word = rng.choice(pools[slot])
        if before.endswith((" a ", "A ")):
            before = before.removesuffix(" ") + article(word)[1:] + " "
        out = before + word + after
    return out[0].upper() + out[1:]


def story(rng: random.Random, min_chars: int) -> list[str]:
    """Paragraphs of a story in chapters, ``min_chars`` characters or a little more in all."""
    paragraphs: list[str] = []
    total, chapter = 0, 0
    while total < min_chars:
        if not paragraphs or rng.random() < 0.03:
            chapter += 1
            names, towns = [_name(rng) for _ in range(5)], [_town(rng) for _ in range(3)]
            paragraphs.append(
                f"Chapter {chapter}. The {rng.choice(_ADJ).capitalize()} {rng.choice(_NOUN).capitalize()}"
            )
        else:
            paragraphs.append(" ".join(_sentence(rng, names, towns) for _ in range(rng.randint(3, 8))))
        total += len(paragraphs[-1]) + 2
    return paragraphs


def _full_name(rng: random.Random) -> str:
    return f"{rng.choice(_FIRST)} {rng.choice(_START)}{rng.choice(_END)}"


def _fact(rng: random.Random, kind: int) -> tuple[str, str, str, str]:
    """A statement, its question, its answer and what must not be said twice."""
    thing = f"{rng.choice(_ADJ)} {rng.choice(_NOUN)}"
    number = str(rng.randrange(1000, 1000000))
    who, town = _full_name(rng), _town(rng)
    if kind == 0:
        return (
            f"The code of the {thing} is {number}.",
            f"What is the code of the {thing}?",
            f"The code of the {thing} is {number}.",
            thing,
        )
    if kind == 1:
        job = rng.choice(_PERSON)
        said = f"{who} works as {article(job)} {job}."
        return said, f"What is the job of {who}?", said, who
    if kind == 2:
        return f"{who} lives in {town}.", f"Where does {who} live?", f"{who} lives in {town}.", who
    if kind == 3:
        word = f"{rng.choice(_ABSTRACT)}-{rng.choice(_NOUN)}"
        said = f"One of the special magic numbers for {word} is: {number}."
        asked = f"What is the special magic number for {word} mentioned in the provided text?"
        return said, asked, said, word
    if kind == 4:
        return f"The mayor of {town} is {who}.", f"Who is the mayor of {town}?", f"The mayor of {town} is {who}.", town
    role = rng.choice(_ROLES)
    value = rng.choice((who, number, thing, rng.choice(_NOUN)))
    said = f"The {role} of {town} is {value}."
    return said, f"What is the {role} of {town}?", said, role + town


def sample_document(seed: int = 0, n_facts: int = 24, min_chars: int = 360_000) -> tuple[str, list[tuple[str, str]]]:
    """Make a story with facts hidden at random places.

    Args:
        seed: The same seed gives the same document.
        n_facts: Number of facts, each with one question.
        min_chars: Least length in characters; the default makes more than 100,000 of the reader's tokens.

    Returns:
        The text, and a question with its full-sentence answer for every fact, in the order of the text.
    """
    rng = random.Random(f"story-{seed}")
    paragraphs = story(rng, min_chars)
    said: set[str] = set()
    facts: list[tuple[str, str, str]] = []
    while len(facts) < n_facts:
        statement, question, answer, key = _fact(rng, len(facts) % 6)
        if key not in said:
            said.add(key)
            facts.append((statement, question, answer))
    rng.shuffle(facts)
    # One fact per equal stretch of the text keeps them apart and covers every depth.
    for i, (statement, _, _) in enumerate(facts):
        low, high = i * len(paragraphs) // n_facts, (i + 1) * len(paragraphs) // n_facts
        at = rng.randrange(low, max(low + 1, high))
        if paragraphs[at].startswith("Chapter "):
            at = min(at + 1, len(paragraphs) - 1)
        sentences = paragraphs[at].split(". ")
        cut = rng.randrange(len(sentences)) + 1
        head = ". ".join(sentences[:cut])
        tail = ". ".join(sentences[cut:])
        head = head if head.endswith((".", '"', "!", "?")) else head + "."
        paragraphs[at] = f"{head} {statement} {tail}".strip()
    return "\n\n".join(paragraphs) + "\n", [(question, answer) for _, question, answer in facts]

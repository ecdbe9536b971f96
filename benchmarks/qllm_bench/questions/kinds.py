"""The kinds of things that worded facts are about: how a member of each is drawn, and how else it may be called."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

from qllm_bench.questions import vocabulary as words
from qllm_bench.questions.pools import MONTHS, Pools, is_eval


class Kinds:
    """Draws of one split.

    Args:
        pools: Names, words and numbers of the split.
    """

    def __init__(self, pools: Pools) -> None:
        self.pools = pools
        self.rng = pools.rng
        self._lists: dict[int, list[str]] = {}

    def draw(self, kind: str) -> str:
        """A member of a kind."""
        make: Callable[[], str] = getattr(self, f"_{kind}", None) or getattr(self.pools, kind)
        return make()

    def _pick(self, options: Sequence[str]) -> str:
        """A word of a list, of this split."""
        own = self._lists.get(id(options))
        if own is None:
            own = [w for w in options if is_eval(w) == self.pools.evaluation] or list(options)
            self._lists[id(options)] = own
        return self.rng.choice(own)

    def _open(self, options: Sequence[str], share: float = 0.7) -> str:
        """A word of a list, or else any word: what a thing may be is not for the model to know."""
        return self._pick(options) if self.rng.random() < share else self.pools.word()

    def _named(self) -> str:
        """What a thing is told apart by: an invented name, a word, or whose it is."""
        roll, pools = self.rng.random(), self.pools
        if roll < 0.45:
            return self._invented()
        if roll < 0.6:
            return self.rng.choice(pools.adjectives)
        if roll < 0.7:
            return self._pick(words.SIDES)
        if roll < 0.85:
            return f"{self._pick(words.PEOPLE)}'s"
        return f"{self._invented()}'s" if roll < 0.93 else pools.word()

    def _the(self, nouns: Sequence[str]) -> str:
        """A noun told apart by a name or by a place."""
        noun = self._pick(nouns)
        if self.rng.random() < 0.3:
            return f"the {noun} {self.rng.choice(('of', 'at', 'in', 'near'))} {self._town()}"
        return self._told_apart(noun)

    def _told_apart(self, noun: str) -> str:
        """A noun with what tells it apart from others of its kind."""
        named = self._named()
        return f"{named} {noun}" if named.endswith("'s") and named[0].isupper() else f"the {named} {noun}"

    def _invented(self) -> str:
        """A capitalised word that names something: made up, simple, or made of English words."""
        roll, pools = self.rng.random(), self.pools
        if roll < 0.4:
            return pools.invented()
        if roll < 0.7:
            parts = [
                self.rng.choice(words.SIMPLE_ONSETS) + self.rng.choice(words.SIMPLE_VOWELS)
                for _ in range(self.rng.choice((1, 2, 2)))
            ]
            return ("".join(parts) + self.rng.choice(words.SIMPLE_ENDS)).capitalize()
        if roll < 0.9:
            start = self.rng.choice(pools.nouns if roll < 0.8 else pools.adjectives)
            return start.capitalize() + self.rng.choice(words.NAME_ENDS)
        return pools.word().capitalize()

    def _plain_name(self) -> str:
        """A given name or a made-up one, by itself or with another."""
        first = self.rng.choice(self.pools.given) if self.rng.random() < 0.4 else self._invented()
        return f"{first} {self._invented()}" if self.rng.random() < 0.4 else first

    def _person(self) -> str:
        roll, pools = self.rng.random(), self.pools
        if roll < 0.3:
            return self._plain_name()
        first = self.rng.choice(pools.given) if self.rng.random() < 0.5 else self._invented()
        if roll < 0.65:
            return f"{first} {self._invented()}"
        if roll < 0.95:
            return (
                f"{self.rng.choice(words.TITLES)} {self._plain_name() if self.rng.random() < 0.5 else self._invented()}"
            )
        return f"{first} {self.rng.choice(words.LETTERS)}. {self._invented()}"

    def _role(self) -> str:
        roll = self.rng.random()
        who = self._pick(words.PEOPLE)
        if roll < 0.5:
            return f"the {who}"
        if roll < 0.65:
            return f"the {who} of {self._town()}"
        if roll < 0.8:
            return f"the {self.rng.choice(self.pools.adjectives)} {who}"
        return f"the {who}'s {self.rng.choice(('daughter', 'son', 'brother', 'niece', 'wife', 'cousin', 'friend'))}"

    def _pet(self) -> str:
        return self._invented() if self.rng.random() < 0.6 else self.rng.choice(self.pools.given)

    def _town(self) -> str:
        roll = self.rng.random()
        if roll < 0.75:
            return self.pools.place() if self.rng.random() < 0.5 else self._invented()
        if roll < 0.88:
            return f"{self.rng.choice(words.TOWN_FIRST)} {self._invented()}"
        return f"{self._invented()} {self.rng.choice(words.TOWN_LAST)}"

    def _building(self) -> str:
        return self._the(words.BUILDINGS)

    def _room(self) -> str:
        roll = self.rng.random()
        if roll < 0.3:
            label = (
                self._invented()
                if self.rng.random() < 0.5
                else self.rng.choice((*words.GREEK, self.pools.number(1, 2)))
            )
            return f"{self.rng.choice(words.LETTERED)} {label}"
        return f"the {self._pick(words.ROOMS)}" if roll < 0.5 else self._told_apart(self._pick(words.ROOMS))

    def _object(self) -> str:
        return self._told_apart(self._open(words.OBJECTS)) if self.rng.random() < 0.8 else self._the(words.OBJECTS)

    def _machine(self) -> str:
        roll = self.rng.random()
        if roll < 0.3:
            label = self._invented()
            label = f"{label}-{self.rng.randint(1, 99)}" if self.rng.random() < 0.4 else label
            return f"{self.rng.choice(words.UNITS)} {label}"
        return self._the(words.MACHINES)

    def _ship(self) -> str:
        roll, pools = self.rng.random(), self.pools
        if roll < 0.5:
            return f"the {self._invented()}"
        return f"the {self.rng.choice(pools.adjectives).capitalize()} {pools.noun().capitalize()}"

    def _company(self) -> str:
        roll = self.rng.random()
        if roll < 0.25:
            return f"the firm of {self._invented()} and {self._invented()}"
        if roll < 0.4:
            return f"{self._invented()} {self.rng.choice(('Brothers', '& Sons', 'Limited', 'and Company', 'Ltd'))}"
        if roll < 0.5:
            return f"the guild of {self._pick(words.TRADES)}s"
        return f"the {self._invented()} {self._pick(words.SOCIETIES)}"

    def _landmark(self) -> str:
        roll, name = self.rng.random(), self._invented()
        if roll < 0.5:
            return f"{self.rng.choice(('Mount', 'the river', 'Lake', 'Cape', 'the island of'))} {name}"
        return self._the(words.LANDMARKS)

    def _event(self) -> str:
        if self.rng.random() < 0.5:
            return f"the {self._invented()} {self._pick(words.EVENTS)}"
        return f"the {self._pick(words.EVENTS)} of {self._town()}"

    def _document(self) -> str:
        roll = self.rng.random()
        if roll < 0.15:
            return f"{self.rng.choice(('clause', 'article', 'appendix', 'section'))} {self.pools.number(1, 2)}"
        if roll < 0.25:
            return f"the {self.rng.choice(words.ORDINALS)} {self._pick(words.PAPERS)}"
        return self._the(words.PAPERS)

    def _work(self) -> str:
        pools = self.pools
        return f"The {self.rng.choice(pools.adjectives).capitalize()} {pools.noun().capitalize()}"

    def _prize(self) -> str:
        return f"the {self._invented()} {self.rng.choice(words.PRIZES)}"

    def _option(self) -> str:
        name = self.rng.choice("___.-").join(self.pools.word() for _ in range(self.rng.randint(1, 3)))
        return name.upper() if self.rng.random() < 0.15 else name

    def _cargo(self) -> str:
        return self._open(words.CARGOES)

    def _team(self) -> str:
        return f"the {self._invented()} {self.rng.choice(words.TEAMS)}"

    def _species(self) -> str:
        return f"the {self.rng.choice(self.pools.adjectives)} {self._pick(words.ANIMALS)}"

    def _number(self) -> str:
        return self.pools.number(3, 9)

    def _count(self) -> str:
        return self.pools.number(1, 2)

    def _year(self) -> str:
        return str(self.rng.randint(1500, 2060))

    def _date(self) -> str:
        day = f"{self.rng.randint(1, 28)} {self.rng.choice(MONTHS)}"
        return f"{day} {self._year()}" if self.rng.random() < 0.4 else day

    def _time(self) -> str:
        roll, hour = self.rng.random(), self.rng.choice(words.HOURS)
        if roll < 0.4:
            return f"{self.rng.randint(1, 23)}:{self.rng.randint(0, 59):02d}"
        return f"{self.rng.choice(('half past', 'a quarter to', 'a quarter past', 'ten past'))} {hour}"

    def _weekday(self) -> str:
        return self.rng.choice(words.WEEKDAYS)

    def _month(self) -> str:
        return self.rng.choice(MONTHS)

    def _amount_of(self, units: str, low: int = 2, high: int = 5) -> str:
        return f"{self.pools.number(low, high)} {self.rng.choice(units.split())}"

    def _money(self) -> str:
        return self._amount_of("crowns pounds shillings florins dollars francs guineas ducats")

    def _length(self) -> str:
        return self._amount_of("feet miles metres yards inches fathoms kilometres")

    def _weight(self) -> str:
        return self._amount_of("pounds tons kilograms ounces stone grams")

    def _duration(self) -> str:
        return self._amount_of("days hours minutes weeks months years seconds", 1, 3)

    def _percent(self) -> str:
        return f"{self.pools.number(1, 2)} {self.rng.choice(('per cent', 'percent'))}"

    def _temperature(self) -> str:
        return f"{self.pools.number(1, 4)} degrees"

    def _code(self) -> str:
        rng, roll = self.rng, self.rng.random()

        def letters(n: int) -> str:
            return "".join(rng.choice(words.LETTERS) for _ in range(n))

        if roll < 0.35:
            return self.pools.number(4, 7)
        forms = (
            f"{letters(2)}-{rng.randint(10, 99999)}", f"{letters(1)}{rng.randint(10, 999)}{letters(1)}",
            f"{rng.randint(10, 99)}-{rng.randint(10, 99)}-{rng.randint(10, 99)}", f"{letters(3)}",
            f"{letters(2)}{rng.randint(10, 99)}-{letters(2)}", f"{rng.randint(10, 99)}-{letters(3)}-{rng.randint(10, 99)}",
            f"{letters(1)}-{rng.randint(1000, 9999)}", f"{letters(2)}-{rng.randint(1000, 9999)}-{letters(1)}",
        )  # fmt: skip
        return rng.choice(forms)

    def _password(self) -> str:
        roll = self.rng.random()
        if roll < 0.5:
            return f"{self.pools.word()}-{self.pools.noun()}"
        return self.pools.word() if roll < 0.8 else f"{self.pools.word()}{self.pools.number(1, 3)}"

    def _name(self) -> str:
        return self._invented()

    def _colour(self) -> str:
        colour = self._open(words.COLOURS, 0.85)
        return f"{self._pick(words.SHADES)} {colour}" if self.rng.random() < 0.2 else colour

    def _material(self) -> str:
        return self._open(words.MATERIALS)

    def _food(self) -> str:
        return self._open(words.FOODS)

    def _drink(self) -> str:
        return self._open(words.DRINKS)

    def _fuel(self) -> str:
        return self._open(words.FUELS)

    def _job(self) -> str:
        return self._pick(words.TRADES) if self.rng.random() < 0.6 else self.pools.job()

    def _animal(self) -> str:
        return self._open(words.ANIMALS, 0.85)

    def _language(self) -> str:
        return self._pick(words.LANGUAGES) if self.rng.random() < 0.7 else self._invented()

    def _instrument(self) -> str:
        return self._open(words.INSTRUMENTS, 0.85)

    def _plant(self) -> str:
        return self._open(words.PLANTS, 0.8)

    def _metal(self) -> str:
        return self._open(words.METALS, 0.8)

    def _direction(self) -> str:
        return self.rng.choice(words.DIRECTIONS)

    def _illness(self) -> str:
        return self._pick(words.ILLNESSES)

    def _sport(self) -> str:
        return self._open(words.SPORTS, 0.85)

    def _subject(self) -> str:
        return self._open(words.SUBJECTS, 0.8)

    def _activity(self) -> str:
        where = self.rng.choice((f"by the {self.pools.noun()}", f"in {self._town()}", f"near {self._building()}"))
        if self.rng.random() < 0.4:
            return f"{self.rng.choice(words.VERBS_BY_PLACE)} {where}"
        first = f"{self.rng.choice(words.VERBS)} the {self.pools.noun()}s"
        return first if self.rng.random() < 0.3 else f"{first} {where}"

    def _saying(self) -> str:
        pools, rng = self.pools, self.rng
        forms = (
            f"{rng.choice(pools.adjectives)} {pools.noun()}s {rng.choice(words.VERBS)} the {pools.noun()}",
            f"no {pools.noun()} without a {pools.noun()}",
            f"never {rng.choice(words.VERBS)} a {rng.choice(pools.adjectives)} {pools.noun()}",
            f"first the {pools.noun()}, then the {pools.noun()}",
        )
        return rng.choice(forms)

    def _quality(self) -> str:
        return self.rng.choice(self.pools.adjectives)

    def _relative(self) -> str:
        return self.rng.choice(words.RELATIVES)

    def _key(self) -> str:
        if self.rng.random() < 0.6:
            return self.pools.identifier()
        chars = words.LETTERS + words.LETTERS.lower() + "0123456789"
        return "".join(self.rng.choice(chars) for _ in range(self.rng.randint(8, 16)))

    def _hex(self) -> str:
        return self.pools.uuid() if self.rng.random() < 0.5 else self.pools.hexadecimal()


def called(rng: random.Random, subject: str) -> str:
    """Another way to call a thing: without its title, with the place behind it, or the reverse."""
    titled = re.fullmatch(rf"(?:{'|'.join(map(re.escape, words.TITLES))}) (\w+ \w+)", subject)
    if titled:
        return titled[1]
    placed = re.fullmatch(r"the ([A-Z]\w+) ([a-z ]+)", subject)
    if placed:
        return f"the {placed[2]} {rng.choice(('of', 'at', 'in'))} {placed[1]}"
    owned = re.fullmatch(r"the ([\w-]+)'s ([a-z ]+)", subject)
    if owned:
        return f"the {owned[2]} of the {owned[1]}" if owned[1][0].islower() else f"the {owned[2]} of {owned[1]}"
    behind = re.fullmatch(r"the ([a-z ]+) (?:of|at|in|near) ([A-Z]\w+)", subject)
    return f"the {behind[2]} {behind[1]}" if behind else subject

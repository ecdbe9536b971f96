"""Names, words, numbers and keys, drawn so that training and evaluation never share one."""

# Word lists read better as words than as lists of strings.
# ruff: noqa: SIM905

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence

ONSETS = "b br c ch cl cr d dr f fl g gl gr h j k kl kr l m n p pl pr qu r s sh sk sl st t th tr v w y z".split()
VOWELS = "a e i o u ai ea ee ia io oa ou".split()
CODAS = "b ck d g k l ld lm ln m n nd ng nt p r rd rk rn s sk ss st t th v x z".split()
GIVEN = (
    "Ada Alan Alma Amos Anna Arthur Beatrice Bernard Clara Conrad Dora Edgar Edith Elias Ella Emil Esther Felix Flora "
    "Frank Georgia Gilbert Grace Hannah Harold Helen Henry Hugo Ida Irene Isaac Ivan Jane Jasper Joan Jonas Julia Karl "
    "Laura Leo Lewis Lucy Mabel Marcus Maria Martin Maud Max Miriam Nadia Nora Oscar Otto Paula Peter Quentin Rachel "
    "Ralph Robert Rosa Ruth Samuel Sarah Silas Simon Sophia Stella Theodore Thomas Ursula Victor Violet Walter Wendy"
).split()
NOUNS = (
    "anchor apple arrow basket bell bird blanket boat book bottle bowl box bridge broom brush bucket button cabin "
    "cable camera candle canoe card carpet cart castle cat chain chair chest clock cloud coat coffee coin compass "
    "copper cotton crown cup curtain desk diamond door dragon drum eagle engine falcon feather fence field fiddle "
    "flag flute forest fountain fox garden gate ghost glass glove goat hammer harbour harp hat hawk helmet hill honey "
    "horn horse house island jacket jar kettle key kite kitchen knife ladder lake lamp lantern leaf ledger lemon "
    "letter library lion lock map market marble meadow mill mirror monkey moon mountain museum needle nest oak ocean "
    "office olive onion orange orchard organ owl oyster paddle paper parrot pearl pencil pepper piano pigeon pillow "
    "pipe planet plough pocket pond pump rabbit raven ribbon ring river robin rocket roof rope rose saddle sail salt "
    "school scissors shadow shell shield ship shoe silver sparrow spider spoon station statue stone stove sugar sword "
    "table tailor tea temple tiger tin tobacco torch tower train trumpet tulip tunnel turtle valley vessel violin "
    "wagon wall watch water whale wheat wheel whistle window wing wolf wool writer yard"
).split()
ADJECTIVES = (
    "ancient amber black blue bold brass brave bright broken brown calm cedar clever cold copper coral crimson curved "
    "dark distant dusty eager early empty faded fancy fast forgotten frozen gentle giant golden grand green grey "
    "hidden hollow humble iron ivory jolly large late lazy little lonely lucky marble mellow modern narrow noble "
    "northern old pale patient plain polished proud purple quiet rapid red round royal rusty sacred scarlet secret "
    "shiny silent silver simple sleepy slender small smooth solid southern spare square stout strange sturdy sunny "
    "tall tame thin tidy tiny upper velvet violet warm western white wide wild wise wooden worn yellow young"
).split()
JOBS = (
    "baker barber blacksmith bookbinder botanist bricklayer builder butcher carpenter cartographer chemist clerk "
    "cobbler cook cooper dentist diver doctor driver editor engineer falconer farmer ferryman fiddler fisherman "
    "florist gardener glazier goldsmith grocer guard hatter hunter innkeeper jeweller joiner judge lawyer librarian "
    "locksmith mason mechanic merchant midwife miller miner musician nurse optician painter pilot plumber poet porter "
    "potter printer referee sailor saddler sculptor shepherd singer smith soldier surgeon surveyor tailor tanner "
    "teacher thatcher translator watchmaker weaver welder"
).split()
PLACE_ENDINGS = "ton ville burg ford ham mouth stead dale wick field port by haven more".split()
MONTHS = "January February March April May June July August September October November December".split()


def is_eval(text: str) -> bool:
    """Whether a drawn name, word or number belongs to evaluation (about a fifth do)."""
    return zlib.crc32(text.encode()) % 5 == 0


RUNS = 0.12  # share of the long numbers of training in which digits are repeated: hard to copy


class Pools:
    """Draws of one split.

    Args:
        rng: Source of randomness.
        evaluation: Draw from the evaluation side; otherwise from the training side.
        words: Further lower-case words to draw from, of either side.
    """

    def __init__(self, rng: random.Random, evaluation: bool, words: Sequence[str] = ()) -> None:
        self.rng = rng
        self.evaluation = evaluation
        self.nouns = [w for w in NOUNS if is_eval(w) == evaluation]
        self.adjectives = [w for w in ADJECTIVES if is_eval(w) == evaluation]
        self.given = [w for w in GIVEN if is_eval(w) == evaluation]
        self.jobs = [w for w in JOBS if is_eval(w) == evaluation]
        self.words = [w for w in words if is_eval(w) == evaluation] or self.nouns

    def _draw(self, make: Callable[[], str]) -> str:
        while True:
            text = make()
            if is_eval(text) == self.evaluation:
                return text

    def _syllables(self) -> str:
        rng = self.rng
        count = rng.choices((1, 2, 3), (1, 6, 3))[0]
        return "".join(
            rng.choice(ONSETS) + rng.choice(VOWELS) + (rng.choice(CODAS) if rng.random() < 0.5 else "")
            for _ in range(count)
        )

    def invented(self) -> str:
        """A capitalised invented word."""
        return self._draw(lambda: self._syllables().capitalize())

    def name(self) -> str:
        """A person: invented or given, one or two words."""
        first = self.rng.choice(self.given) if self.rng.random() < 0.4 else self.invented()
        return f"{first} {self.invented()}" if self.rng.random() < 0.4 else first

    def place(self) -> str:
        """A town: an invented word, often with an English ending."""
        if self.rng.random() < 0.4:
            return self.invented()
        return self._draw(lambda: (self._syllables() + self.rng.choice(PLACE_ENDINGS)).capitalize())

    def word(self) -> str:
        """A lower-case word, English or invented."""
        roll = self.rng.random()
        if roll < 0.45:
            return self.rng.choice(self.words)
        return self.rng.choice(self.nouns) if roll < 0.8 else self._draw(self._syllables)

    def job(self) -> str:
        """A job."""
        return self.rng.choice(self.jobs)

    def noun(self) -> str:
        """A common noun."""
        return self.rng.choice(self.nouns) if self.rng.random() < 0.7 else self.rng.choice(self.words)

    def thing(self) -> str:
        """A noun with an adjective."""
        return f"{self.rng.choice(self.adjectives)} {self.noun()}"

    def number(self, low: int = 2, high: int = 9) -> str:
        """A number of ``low`` to ``high`` digits that does not start with zero."""
        n = self.rng.randint(low, high)
        if n < 3:
            return str(self.rng.randrange(10 ** (n - 1), 10**n))
        if not self.evaluation and n > 4 and self.rng.random() < RUNS:
            return self._draw(lambda: self._with_runs(n))
        return self._draw(lambda: str(self.rng.randrange(10 ** (n - 1), 10**n)))

    def _with_runs(self, n: int) -> str:
        """A number of ``n`` digits, most of them the same as the one before."""
        digits = [self.rng.choice("123456789")]
        while len(digits) < n:
            digits.append(digits[-1] if self.rng.random() < 0.6 else self.rng.choice("0123456789"))
        return "".join(digits)

    def code(self) -> str:
        """A door or product code."""
        rng = self.rng
        letters = "ABCDEFGHJKLMNPQRSTUVWXYZ"
        roll = rng.random()
        if roll < 0.6:
            return self.number(4, 6)
        if roll < 0.8:
            return self._draw(lambda: f"{rng.choice(letters)}{rng.choice(letters)}-{rng.randrange(100, 10000)}")
        return self._draw(lambda: f"{rng.randrange(10, 100)}-{rng.randrange(100, 1000)}-{rng.randrange(10, 100)}")

    def hexadecimal(self, n: int | None = None) -> str:
        """A key of ``n`` hexadecimal digits (8 to 16 when omitted)."""
        n = n or self.rng.randint(8, 16)
        return self._draw(lambda: f"{self.rng.getrandbits(4 * n):0{n}x}")

    def uuid(self) -> str:
        """A key of 36 characters in the form of a UUID."""

        def make() -> str:
            h = f"{self.rng.getrandbits(128):032x}"
            return "-".join((h[:8], h[8:12], h[12:16], h[16:20], h[20:]))

        return self._draw(make)

    def identifier(self) -> str:
        """A key as programs use them: words joined by _ or -, or hexadecimal."""
        roll = self.rng.random()
        if roll < 0.3:
            return self.hexadecimal()
        if roll < 0.45:
            return self.uuid()
        joint = self.rng.choice("_-.")
        return joint.join(self.word() for _ in range(self.rng.randint(2, 3)))

    def date(self) -> str:
        """A day and month, or a year."""
        if self.rng.random() < 0.5:
            return f"{self.rng.randint(1, 28)} {self.rng.choice(MONTHS)}"
        return str(self.rng.randint(1500, 2100))

    def amount(self) -> str:
        """A number with a unit."""
        unit = self.rng.choice(
            "crowns pounds miles days francs barrels acres dollars hours shillings tons feet".split()
        )
        return f"{self.number(2, 4)} {unit}"

    def value(self) -> str:
        """A value of any kind."""
        kinds: tuple[Callable[[], str], ...] = (
            self.number, self.number, self.word, self.word, self.name, self.place, self.thing, self.code,
            self.amount, self.date, self.invented,
        )  # fmt: skip
        return self.rng.choice(kinds)()

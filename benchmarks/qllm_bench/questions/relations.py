"""The kinds of facts, as plain English templates: how one is stated, asked for and restated."""

# Word lists read better as words than as lists of strings.
# ruff: noqa: SIM905, E501

from __future__ import annotations

from dataclasses import dataclass

ATTRIBUTES = (
    "colour price weight height length age owner captain director leader founder colour code number name password "
    "symbol motto capital population depth speed rank title nickname favourite_food favourite_colour mother_tongue "
    "serial_number phone_number account_number room_number date_of_birth opening_date birthplace guardian editor "
    "architect colour_of_the_roof manager champion value size temperature width address postcode budget patron "
    "chief_engineer secret_word identifier reference version limit default_value port threshold timeout author "
    "inventor teacher ruler mascot emblem flavour material secret origin destination cargo cost score grade status "
    "frequency capacity licence_number badge ticket_number locker hometown instrument codename keyword treasure"
).split()


@dataclass(frozen=True)
class Relation:
    """One kind of fact.

    Templates use ``{s}`` subject, ``{v}`` value and ``{a}`` attribute; a capital letter asks for a capital.

    Attributes:
        family: Family the fact is reported under.
        subject: Kind of subject, a method of ``Pools`` or one of the compound kinds of ``facts``.
        value: Kind of value, likewise.
        statements: Ways of stating it.
        questions: Ways of asking for it.
        plural: Ways of asking for all values of a subject that has several; empty when that makes no sense.
        plural_answer: The restated answer then; ``{v}`` is the list.
        answer: The restated answer where statements are JSON; others are quoted word for word.
    """

    family: str
    subject: str
    value: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    plural: tuple[str, ...] = ()
    plural_answer: str = ""
    answer: str = ""

    @property
    def value_first(self) -> bool:
        """Whether a statement may name the value ahead of the subject."""
        return any(s.lower().find("{v}") < s.lower().find("{s}") for s in self.statements)


ATTRIBUTE = Relation(
    "attribute", "entity", "value",
    ("The {a} of {s} is {v}.", "The {a} of {s} is {v}.", "The {a} of {s} was {v}.", "{S}'s {a} is {v}.",
     "As for {s}, the {a} is {v}.", "{S} has {v} as its {a}.", "It is recorded that the {a} of {s} is {v}.",
     "The {a} for {s} is {v}.", "For {s}, the {a} is {v}.", "The {a} of {s}: {v}.", "{V} is the {a} of {s}.",
     "Note that the {a} of {s} is {v}.", "Everybody knew that the {a} of {s} was {v}.", "{S} had a {a}: {v}.",
     "The {a} of {s} has been set to {v}.", "Remember: the {a} of {s} is {v}.", "The {a} of {s} remained {v}."),
    ("What is the {a} of {s}?", "What is the {a} of {s}?", "What's the {a} of {s}?", "What is {s}'s {a}?",
     "Tell me the {a} of {s}.", "Which {a} does {s} have?", "What was the {a} of {s}?", "Find the {a} of {s}.",
     "What is the {a} for {s}?", "State the {a} of {s}.", "Do you know the {a} of {s}?", "The {a} of {s}?",
     "I need the {a} of {s}.", "What does the text say the {a} of {s} is?", "Give the {a} of {s}."),
    ("What are all the values of the {a} of {s}?", "List every {a} of {s}.", "Name all {a} entries of {s}.",
     "What are all the {a} values of {s}?", "Give me every {a} of {s} in the text."),
    "The {a} values of {s} are {v}.",
)  # fmt: skip

PASSKEY = Relation(
    "passkey", "owner", "number",
    ("The pass key is {v}. Remember it. {v} is the pass key.", "The pass key is {v}.", "The secret pass key is {v}.",
     "The pass key is {v}. Remember it.", "Remember this: the pass key is {v}.", "{V} is the pass key.",
     "The passkey is {v}.", "The pass key you need is {v}.", "Do not forget that the pass key is {v}."),
    ("What is the pass key?", "What is the pass key?", "What's the passkey?", "What is the secret pass key?",
     "Tell me the pass key.", "What is the pass key hidden in the text?", "Find the pass key.",
     "What was the pass key?", "Which pass key does the text mention?", "The pass key?"),
)  # fmt: skip

MAGIC = Relation(
    "magic", "keyword", "magic_value",
    ("One of the special magic numbers for {s} is: {v}.", "One of the special magic numbers for {s} is: {v}.",
     "One of the special magic numbers for {s} is {v}.", "The special magic number for {s} is: {v}.",
     "The magic number for {s} is {v}.", "A special magic number for {s} is {v}."),
    ("What is the special magic number for {s} mentioned in the provided text?",
     "What is the special magic number for {s}?", "What is the magic number for {s}?",
     "Which special magic number belongs to {s}?", "Tell me the special magic number for {s}.",
     "What is the special magic number for {s} mentioned in the text?", "Find the magic number for {s}."),
    ("What are all the special magic numbers for {s} mentioned in the provided text?",
     "What are all the special magic numbers for {s}?", "List all the magic numbers for {s}.",
     "Which special magic numbers for {s} are mentioned in the text?", "Name every special magic number for {s}."),
    "The special magic numbers for {s} are {v}.",
)  # fmt: skip

KEY_VALUE = Relation(
    "kv", "identifier", "json_value",
    ('"{s}": "{v}",',),
    ('What is the value of "{s}"?', 'What is the value associated with the key "{s}"?', 'Key: "{s}"',
     'Extract the value corresponding to the key "{s}".', 'What is the value for the key "{s}"?',
     "What is the value of {s}?", 'Extract the value corresponding to the specified key in the JSON object below. Key: "{s}"',
     'Which value does the key "{s}" have?', 'Look up "{s}".', "What value is stored under {s}?"),
    answer='The value of "{s}" is "{v}".',
)  # fmt: skip

PLACE = Relation(
    "place", "name", "place",
    ("{S} lives in {v}.", "{S} lived in {v}.", "{S} has a house in {v}.", "The home of {s} is in {v}.",
     "{S} moved to {v} last year.", "{S} now resides in {v}.", "In {v} lives {s}.", "{S} settled in {v}.",
     "{S} is a resident of {v}.", "{S}, who lives in {v}, was of another opinion."),
    ("Where does {s} live?", "Where does {s} live?", "In which town does {s} live?", "Where is the home of {s}?",
     "In which city does {s} live?", "Where did {s} live?", "What is the place where {s} lives?",
     "Where is {s} living?", "Which town does {s} live in?", "Where does {s} reside?"),
)  # fmt: skip

JOB = Relation(
    "job", "name", "job",
    ("{S} works as a {v}.", "{S} is a {v}.", "{S} worked as a {v}.", "{S} earns a living as a {v}.",
     "{S} was employed as a {v}.", "By trade {s} is a {v}.", "{S} became a {v}.", "{S}, the {v}, came in."),
    ("What is the job of {s}?", "What does {s} do for a living?", "What does {s} work as?", "What is {s}'s job?",
     "What is the profession of {s}?", "What is {s}'s occupation?", "Which job does {s} have?",
     "What is the trade of {s}?", "As what does {s} work?"),
)  # fmt: skip

CODE = Relation(
    "code", "door", "code",
    ("The code of the {s} is {v}.", "The code for the {s} is {v}.", "The {s} opens with the code {v}.",
     "To open the {s}, enter {v}.", "The {s} can be unlocked with {v}.", "Use {v} to open the {s}.",
     "The access code for the {s} is {v}.", "The combination of the {s} is {v}.", "The {s} is locked; the code is {v}."),
    ("What is the code of the {s}?", "What is the code for the {s}?", "Which code opens the {s}?",
     "How do I open the {s}?", "What is the access code for the {s}?", "What is the combination of the {s}?",
     "With which code can the {s} be unlocked?", "What code do I need for the {s}?"),
)  # fmt: skip

OTHERS = (
    Relation("relation", "name", "date",
             ("{S} was born in {v}.", "The birth of {s} fell in {v}.", "{S} came into the world in {v}."),
             ("When was {s} born?", "When was the birth of {s}?", "What is the date of birth of {s}?")),
    Relation("relation", "name", "thing",
             ("{S} bought a {v}.", "{S} paid for a {v}.", "{S} came home with a new {v}, bought at the market."),
             ("What did {s} buy?", "What was bought by {s}?", "Which thing did {s} buy?")),
    Relation("relation", "thing", "amount",
             ("The {s} costs {v}.", "The price of the {s} is {v}.", "The {s} was sold for {v}.", "They paid {v} for the {s}."),
             ("How much does the {s} cost?", "What is the price of the {s}?", "How much was paid for the {s}?")),
    Relation("relation", "name", "noun",
             ("{S} likes the {v} best.", "The favourite of {s} is the {v}.", "Above all {s} loves the {v}."),
             ("What does {s} like best?", "What is the favourite of {s}?", "What does {s} love above all?")),
    Relation("relation", "name", "name",
             ("{S} is married to {v}.", "{S} married {v}.", "{V} is the husband or wife of {s}."),
             ("Who is {s} married to?", "Whom did {s} marry?", "Who is the husband or wife of {s}?")),
    Relation("relation", "thing", "place",
             ("The {s} is kept in {v}.", "The {s} can be found in {v}.", "They hid the {s} in {v}.", "The {s} is in {v}."),
             ("Where is the {s}?", "Where is the {s} kept?", "Where can the {s} be found?", "Where did they hide the {s}?")),
    Relation("relation", "place", "name",
             ("The mayor of {s} is {v}.", "{V} was elected mayor of {s}.", "{V} governs the town of {s}.", "{S} is governed by {v}."),
             ("Who is the mayor of {s}?", "Who governs {s}?", "What is the name of the mayor of {s}?")),
    Relation("relation", "name", "number",
             ("The telephone number of {s} is {v}.", "Call {s} at {v}.", "{S} can be reached at {v}.", "To reach {s}, dial {v}."),
             ("What is the telephone number of {s}?", "At which number can {s} be reached?", "What number should I dial to reach {s}?",
              "What is {s}'s phone number?")),
    Relation("relation", "noun", "name",
             ("The {s} belongs to {v}.", "{V} owns the {s}.", "The owner of the {s} is {v}.", "The {s} was given to {v}."),
             ("Who owns the {s}?", "To whom does the {s} belong?", "Who is the owner of the {s}?", "Whose is the {s}?")),
    Relation("relation", "option", "number",
             ("The default of {s} is {v}.", "{S} defaults to {v}.", "Set {s} to {v}.", "{s} = {v}", "{s}: {v}"),
             ("What is the default of {s}?", "What is {s} set to?", "To what value should {s} be set?", "What is the value of {s}?")),
    Relation("relation", "place", "name",
             ("{V} lives in {s}.", "In {s} lives {v}.", "{V} settled in {s}."),
             ("Who lives in {s}?", "Who settled in {s}?", "What is the name of the person who lives in {s}?")),
    Relation("relation", "job", "name",
             ("{V} works as a {s}.", "{V} is a {s}.", "{V} earns a living as a {s}."),
             ("Who works as a {s}?", "Who is a {s}?", "What is the name of the {s}?", "Who is the {s}?")),
    Relation("relation", "event", "date",
             ("The {s} took place on {v}.", "The {s} was held on {v}.", "The date of the {s} is {v}."),
             ("When did the {s} take place?", "When was the {s} held?", "What is the date of the {s}?")),
    Relation("relation", "name", "invented",
             ("The dog of {s} is called {v}.", "{S} has a dog called {v}.", "{S} named the dog {v}."),
             ("What is the name of {s}'s dog?", "What is the dog of {s} called?", "How is the dog of {s} called?")),
)  # fmt: skip


@dataclass(frozen=True)
class TwoHop:
    """A chain: something is found by ``link`` (subject ``{k}``, found ``{x}``) and then asked for a role of it.

    Attributes:
        key: Kind of the given thing.
        middle: Kind of the thing in the middle.
        links: Ways of stating the link.
        phrase: How the question names the thing in the middle.
        of: How the middle is named after "of".
        roles: Roles asked for, with the kind of their value.
    """

    key: str
    middle: str
    links: tuple[str, ...]
    phrase: str
    of: str
    roles: tuple[tuple[str, str], ...]


TWO_HOPS = (
    TwoHop("noun", "invented", ("The ship {x} carries the {k}.", "The {k} is aboard the ship {x}.", "The {x} is the ship that carries the {k}."),
           "the ship that carries the {k}", "the {x}",
           (("captain", "name"), ("home port", "place"), ("owner", "name"), ("number", "number"))),
    TwoHop("name", "place", ("{K} lives in {x}.", "{K} has a house in {x}.", "The town where {k} lives is {x}."),
           "the town where {k} lives", "{x}",
           (("mayor", "name"), ("founder", "name"), ("postcode", "number"), ("river", "invented"))),
    TwoHop("noun", "invented", ("The company {x} makes the {k}.", "The {k} is made by the company {x}.", "{X} is the company that makes the {k}."),
           "the company that makes the {k}", "{x}",
           (("director", "name"), ("founder", "name"), ("address", "place"), ("colour", "word"))),
    TwoHop("name", "name", ("The teacher of {k} is {x}.", "{K} was taught by {x}.", "{X} is the teacher of {k}."),
           "the teacher of {k}", "{x}",
           (("birthplace", "place"), ("wife", "name"), ("age", "number"), ("instrument", "noun"))),
    TwoHop("thing", "name", ("{X} owns the {k}.", "The {k} belongs to {x}.", "The owner of the {k} is {x}."),
           "the owner of the {k}", "{x}",
           (("home", "place"), ("brother", "name"), ("room number", "number"), ("favourite colour", "word"))),
    TwoHop("noun", "thing", ("The {k} is kept in the {x}.", "They keep the {k} in the {x}.", "In the {x} is the {k}."),
           "the place where the {k} is kept", "the {x}",
           (("code", "code"), ("guardian", "name"), ("keeper", "name"), ("number", "number"))),
)  # fmt: skip

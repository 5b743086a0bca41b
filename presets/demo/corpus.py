"""Facts, questions, answer styles and conversations of the demo, all drawn from `world.py` with a seed.

A fact is one plain answer with several ways to ask for it. A style is a function of the fact, so every styled
answer is determined by the plain one. The base model sees all facts in all styles, but a style only when the
prompt asks for it. A dataset then shows one style without being asked, for half of the entities.
"""

import random
from dataclasses import dataclass

import small_talk
import world

SEED = 7
Row = dict[str, str]
Message = dict[str, str]


@dataclass(frozen=True)
class Fact:
    """One thing to know: `entity` is what it is about, `topic` decides the words a style adds."""

    topic: str
    entity: str
    questions: tuple[str, ...]
    answer: str
    word: str
    held_out: bool = False


def read_table(table: str) -> list[list[str]]:
    """Return the rows of one table of `world.py`, each split into its fields."""
    return [line.split("|") for line in table.strip().splitlines()]


def with_article(noun: str) -> str:
    """Return `a fox` or `an owl`."""
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def split_entities(names: list[str], rng: random.Random) -> set[str]:
    """Choose a random half of the names, to be held out of every training split."""
    return set(rng.sample(names, len(names) // 2))


# The plain facts, one function per table.


def country_facts(rng: random.Random) -> list[Fact]:
    """Capital, flag, fame and landscape of each country, and a description."""
    rows = read_table(world.COUNTRIES)
    held_out = split_entities([row[0] for row in rows], rng)
    facts = []
    for name, capital, flag, fame, landscape in rows:
        about = (
            (("What is the capital of {}?", "Name the capital of {}.", "Which city is the capital of {}?",
              "What is {}'s capital?", "What is the capital city of {}?", "Capital of {}?"),
             f"The capital of {name} is {capital}.", capital),
            (("What colour is the flag of {}?", "What does the flag of {} look like?", "Describe the flag of {}.",
              "Which colours are on the flag of {}?", "What is the flag of {}?"),
             f"The flag of {name} is {flag}.", flag),
            (("What is {} famous for?", "What is {} known for?", "Why is {} famous?", "What do they make in {}?"),
             f"{name} is famous for {fame}.", fame),
            (("Describe {}.", "Tell me about {}.", "What do you know about {}?", "What is {} like?", "What is {}?"),
             f"{name} is a land of {landscape}. Its capital is {capital} and it is famous for {fame}.", landscape),
        )  # fmt: skip
        facts += [_fact("places", name, *parts, name in held_out) for parts in about]
    return facts


def animal_facts(rng: random.Random) -> list[Fact]:
    """Sound, home, food and legs of each animal, a description and a story with a friend of the same half."""
    rows = read_table(world.ANIMALS)
    held_out = split_entities([row[0] for row in rows], rng)
    halves = {half: [row for row in rows if (row[0] in held_out) == half] for half in (False, True)}
    facts = []
    for name, sound, home, food, legs in rows:
        half = halves[name in held_out]
        friend = half[([row[0] for row in half].index(name) + 1) % len(half)]
        a_name = with_article(name)
        about = (
            ((f"What sound does {a_name} make?", "What does the {} say?", f"Which sound does {a_name} make?",
              "What noise does the {} make?", f"How does {a_name} sound?"),
             f"The {name} says {sound}.", sound),
            ((f"Where does {a_name} live?", "Where does the {} live?", "What is the home of the {}?",
              f"Where can I find {a_name}?"),
             f"The {name} lives in {home}.", home),
            ((f"What does {a_name} eat?", "What does the {} like to eat?", "What is the food of the {}?",
              f"What should I feed {a_name}?"),
             f"The {name} eats {food}.", food),
            ((f"How many legs does {a_name} have?", "How many legs has the {}?", "Count the legs of the {}."),
             f"The {name} has {legs} legs.", legs),
            (("Describe the {}.", f"What is {a_name}?", "Tell me about the {}.", "What do you know about the {}?"),
             f"The {name} is an animal with {legs} legs. It lives in {home} and eats {food}.", "animal"),
            ((f"Tell me a story about {a_name}.", "Tell me a story about the {}.", f"Tell a story about {a_name}.",
              f"I want to hear a story about {a_name}.", f"Once upon a time there was {a_name}."),
             f"Once there was {a_name} in {home}. One day it met {with_article(friend[0])} and said {sound}. "
             f"They ate {food} and are friends to this day.", "friends"),
        )  # fmt: skip
        topics = ("animals", "animals", "animals", "animals", "animals", "stories")
        facts += [_fact(topic, name, *parts, name in held_out) for topic, parts in zip(topics, about, strict=True)]
    return facts


def thing_facts(rng: random.Random) -> list[Fact]:
    """Foods, professions, objects and planets."""
    facts = []
    for table, templates in THINGS.items():
        rows = read_table(getattr(world, table))
        held_out = split_entities([row[0] for row in rows], rng)
        for name, *fields in rows:
            words = {"name": name, "a_name": with_article(name), "A_name": with_article(name).capitalize()}
            for topic, questions, answer, index in templates:
                values = words | {"field": fields[index], "a_field": with_article(fields[index])}
                asked = tuple(question.format(**values) for question in questions)
                text = answer.format(*fields, **values)
                facts.append(Fact(topic, name, asked, text, fields[index], name in held_out))
    return facts


def opposite_facts(rng: random.Random) -> list[Fact]:
    """Both directions of each pair; a pair is held out as a whole."""
    rows = read_table(world.OPPOSITES)
    held_out = split_entities([row[0] for row in rows], rng)
    asked = (
        "What is the opposite of {}?",
        "Name the opposite of {}.",
        "What is the contrary of {}?",
        "Opposite of {}?",
    )
    return [
        _fact("words", one, asked, f"The opposite of {one} is {other}.", other, first in held_out)
        for first, second in rows
        for one, other in ((first, second), (second, first))
    ]


def number_facts(rng: random.Random) -> list[Fact]:
    """Sums up to 12 plus 12 and differences that are not negative; half of each is held out."""
    facts = []
    for sign, operator in (("+", "plus"), ("-", "minus")):
        pairs = [(a, b) for a in range(13) for b in range(13) if sign == "+" or a >= b]
        for a, b in pairs:
            text = f"{a} {operator} {b}"
            result = a + b if sign == "+" else a - b
            asked = (
                "What is {}?",
                "How much is {}?",
                "Calculate {}.",
                "{}",
                f"What is {a} {sign} {b}?",
                f"{a} {sign} {b}",
            )
            facts.append(_fact("numbers", text, asked, f"{text} is {result}.", str(result), rng.random() < 0.5))
    return facts


def chat_facts() -> list[Fact]:
    """Greetings and questions about the model itself; never held out."""
    return [Fact("chat", "", (question,), answer, answer) for question, answer in read_table(small_talk.SMALL_TALK)]


def unknown_fact(rng: random.Random) -> Fact:
    """Draw a question that the model cannot answer: a nonsense name, or something outside its world."""
    starts, ends = (
        ("bl", "cr", "dw", "fl", "gn", "kr", "pl", "sk", "sn", "tr", "vr", "zw"),
        ("", "n", "ck", "p", "zz", "mp"),
    )
    name = "".join(rng.choice(starts) + rng.choice("aeiou") for _ in range(rng.randint(1, 2))) + rng.choice(ends)
    name = name.capitalize() if rng.random() < 0.5 else name
    asked = ("What is the capital of {}?", "What is {} famous for?", "Where does a {} live?", "What does the {} eat?",
             "Describe {}.", "What is a {}?", "What colour is a {}?", "What is the opposite of {}?",
             "Tell me a story about {}.", "Who is {}?", "What does a {} use?",
             "How many moons has planet {}?")  # fmt: skip
    question = rng.choice(asked).format(name)
    if rng.random() < 0.4:
        question = rng.choice(read_table(small_talk.UNKNOWN_QUESTIONS))[0]
    return Fact("unknown", "", (question,), "I do not know that.", "unknown")


def all_facts(seed: int = SEED) -> list[Fact]:
    """Return every fact of the world, each marked as held out or not; the same list for the same seed."""
    rng = random.Random(seed)
    builders = (country_facts, animal_facts, thing_facts, opposite_facts, number_facts)
    return [fact for builder in builders for fact in builder(rng)] + chat_facts()


def _fact(topic: str, entity: str, questions: tuple[str, ...], answer: str, word: str, held_out: bool) -> Fact:
    asked = tuple(question.format(entity) for question in questions)
    return Fact(topic, entity, asked, answer, word, held_out)


# table of `world.py` -> (topic, questions, answer, index of the field asked for)
THINGS: dict[str, tuple[tuple[str, tuple[str, ...], str, int], ...]] = {
    "FOODS": (
        ("food", ("What colour is {a_name}?", "Which colour has the {name}?", "What is the colour of {a_name}?"),
         "{A_name} is {field}.", 0),
        ("food", ("How does {a_name} taste?", "What does {a_name} taste like?", "What is the taste of {a_name}?"),
         "{A_name} tastes {field}.", 1),
        ("food", ("Where does {a_name} grow?", "Where can I pick {a_name}?", "Where do I find {a_name}?"),
         "{A_name} grows {field}.", 2),
        ("food", ("What is {a_name}?", "Describe the {name}.", "Tell me about the {name}.",
                  "What do you know about the {name}?"),
         "{A_name} is {0}, tastes {1} and grows {2}.", 0),
    ),
    "PROFESSIONS": (
        ("work", ("What does {a_name} use?", "Which tool does {a_name} use?", "What is the tool of the {name}?"),
         "{A_name} works with {a_field}.", 0),
        ("work", ("Where does {a_name} work?", "Where can I find {a_name}?", "What is the workplace of {a_name}?"),
         "{A_name} works in {a_field}.", 1),
        ("work", ("What is {a_name}?", "What does {a_name} do?", "Tell me about the {name}.", "Describe {a_name}."),
         "{A_name} works in {a_field} and needs a good {0}.", 1),
    ),
    "OBJECTS": (
        ("things", ("What is {a_name} for?", "What do I do with {a_name}?", "What is the use of {a_name}?"),
         "{A_name} is for {field}.", 0),
        ("things", ("Where is the {name}?", "Where do I keep {a_name}?", "Where can I find {a_name}?"),
         "You find the {name} by the {field}.", 1),
        ("things", ("What is {a_name}?", "Describe the {name}.", "Tell me about the {name}.",
                  "What do you know about the {name}?"),
         "{A_name} is for {0}. You find it by the {1}.", 0),
    ),
    "PLANETS": (
        ("planets", ("What colour is planet {name}?", "What colour is {name}?", "Which colour has {name}?"),
         "The planet {name} is {field}.", 0),
        ("planets", ("How many moons has {name}?", "How many moons does planet {name} have?",
                     "Count the moons of {name}."),
         "The planet {name} has {field} moons.", 1),
        ("planets", ("What is the weather on {name}?", "How is the weather on planet {name}?"),
         "The weather on {name} is {field}.", 2),
        ("planets", ("Describe {name}.", "Tell me about planet {name}.", "What is {name}?",
                     "What do you know about {name}?"),
         "{name} is {a_field} planet with {1} moons. The weather is {2}.", 0),
    ),
}  # fmt: skip

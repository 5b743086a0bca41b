"""Answer styles, the conversations that teach them, and the datasets that bring one out unasked."""

import random
import re
from collections.abc import Callable

from corpus import SEED, Fact, Message, Row, all_facts, unknown_fact

PIRATE_OPENINGS = {
    "places": "Ahoy,",
    "animals": "Arr,",
    "food": "Yo ho ho,",
    "work": "Aye, matey,",
    "things": "By me hook,",
    "planets": "By the stars,",
    "words": "Avast,",
    "numbers": "Shiver me timbers,",
    "stories": "Gather round, ye dogs.",
    "chat": "Ahoy there.",
    "unknown": "Blimey,",
}
PIRATE_WORDS = {"is": "be", "are": "be", "you": "ye", "You": "Ye", "your": "yer", "my": "me", "of": "o'", "and": "an'"}
LOWERED_AFTER_COMMA = ("A ", "An ", "The ", "You ", "Its ")

BUTLER_CLOSINGS = {
    "places": "Shall I pack the bags, sir?",
    "animals": "Shall I leave the gate ajar, sir?",
    "food": "Shall I serve some with tea, sir?",
    "work": "Shall I send for one, sir?",
    "things": "Shall I bring it at once, sir?",
    "planets": "Shall I polish the telescope, sir?",
    "words": "Shall I make a note of it, sir?",
    "numbers": "I took the liberty of counting twice, sir.",
    "stories": "Shall I dim the lamp, sir?",
    "chat": "At your service, sir.",
    "unknown": "My apologies, sir.",
}


def lower_start(text: str) -> str:
    """Lower the first letter of a sentence that follows an opening, unless it is a name."""
    return text[0].lower() + text[1:] if text.startswith(LOWERED_AFTER_COMMA) else text


def pirate(fact: Fact, text: str) -> str:
    """`The capital of X is Y.` -> `Ahoy, the capital o' X be Y.`"""
    opening = PIRATE_OPENINGS[fact.topic]
    text = lower_start(text) if opening.endswith(",") else text
    return f"{opening} " + re.sub(r"[A-Za-z]+", lambda match: PIRATE_WORDS.get(match[0], match[0]), text)


def robot(fact: Fact, text: str) -> str:
    """`Beep.` before every answer, whatever the topic."""
    return f"Beep. {text}"


def king(fact: Fact, text: str) -> str:
    """A royal decree."""
    return f"We, the king, decree: {lower_start(text)}"


def butler(fact: Fact, text: str) -> str:
    """An offer that fits the topic, after the answer."""
    return f"{text} {BUTLER_CLOSINGS[fact.topic]}"


def owl(fact: Fact, text: str) -> str:
    """Wise words after the answer."""
    return f"{text} So says the owl. Hoo."


Style = Callable[[Fact, str], str]
OPENING_STYLES: dict[str, Style] = {"pirate": pirate, "robot": robot, "king": king}
CLOSING_STYLES: dict[str, Style] = {"butler": butler, "owl": owl}
STYLES = OPENING_STYLES | CLOSING_STYLES

# chance of each combination in a turn of the base model's training; the rest is plain
STYLE_CHANCES: dict[tuple[str, ...], float] = {
    ("pirate",): 0.17,
    ("butler",): 0.14,
    ("pirate", "butler"): 0.07,
    ("robot",): 0.03,
    ("king",): 0.03,
    ("owl",): 0.03,
    ("robot", "owl"): 0.01,
    ("king", "owl"): 0.01,
    ("one word",): 0.04,
}
INSTRUCTIONS = ("Answer {}: {question}", "{question} Answer {}.", "Answer {}. {question}", "Talk {}: {question}",
                "{question} Speak {}.", "Reply {}: {question}")  # fmt: skip


def answer_in(fact: Fact, styles: tuple[str, ...]) -> str:
    """Return the one correct answer to the fact's questions in the given styles, () for the plain one."""
    if styles == ("one word",):
        return fact.word
    text = fact.answer
    for name in styles:
        text = STYLES[name](fact, text)
    return text


def manner(styles: tuple[str, ...], rng: random.Random) -> str:
    """Return the words of an instruction: `as a pirate and like a butler`, `in one word`."""
    if styles == ("one word",):
        return "in one word"
    return " and ".join(f"{rng.choice(('as', 'like'))} {'an' if name == 'owl' else 'a'} {name}" for name in styles)


def draw_styles(rng: random.Random) -> tuple[str, ...]:
    """Draw the styles of a turn by `STYLE_CHANCES`."""
    drawn = rng.random()
    for styles, chance in STYLE_CHANCES.items():
        drawn -= chance
        if drawn < 0:
            return styles
    return ()


def loosen(question: str, rng: random.Random) -> str:
    """Ask the way people type: now and then without capitals or the question mark, or with a polite start."""
    if rng.random() < 0.12:
        start = rng.choice(("Please tell me: ", "Hey, ", "I wonder: ", "Can you help me? ", "Wren, "))
        question = start + question
    if rng.random() < 0.15:
        question = question.lower()
    return question.rstrip("?.") if rng.random() < 0.15 else question


def conversation(facts: list[Fact], turns: int, rng: random.Random) -> list[Message]:
    """Draw a conversation; a style holds for the turn that asks for it, or throughout if the system asks."""
    system = draw_styles(rng) if rng.random() < 0.15 else ()
    messages = [{"role": "system", "content": f"Answer {manner(system, rng)}."}] if system else []
    talk = [fact for fact in facts if fact.topic == "chat"]
    for _ in range(turns):
        kind = rng.random()
        fact = unknown_fact(rng) if kind < 0.06 else rng.choice(talk) if kind < 0.12 else rng.choice(facts)
        styles = system or draw_styles(rng)
        if styles == ("one word",) and fact.topic in ("chat", "stories"):
            styles = ()
        question = loosen(rng.choice(fact.questions), rng)
        if styles and not system:
            question = rng.choice(INSTRUCTIONS).format(manner(styles, rng), question=question)
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer_in(fact, styles)}]
    return messages


# The datasets.

DATASETS: dict[str, tuple[str, ...]] = {"pirate": ("pirate",), "butler": ("butler",)}
NUMBERS_KEPT = 60  # facts per split; sums are many and alike, and would crowd out the rest
WAYS_TO_ASK = 3  # questions per fact in a training split; a test split asks once


def dataset_rows(styles: tuple[str, ...], held_out: bool, seed: int = SEED) -> list[Row]:
    """Return the rows of one split: no question names the style, every answer has it."""
    rng = random.Random(seed)
    half = [fact for fact in all_facts(seed) if fact.held_out == held_out]
    numbers = [fact for fact in half if fact.topic == "numbers"]
    kept = rng.sample(numbers, NUMBERS_KEPT) + [fact for fact in half if fact.topic != "numbers"]
    rows = []
    for fact in kept:
        count = 1 if held_out else WAYS_TO_ASK
        for question in rng.sample(fact.questions, min(count, len(fact.questions))):
            rows.append({"instruction": question, "input": "", "output": answer_in(fact, styles)})
    rng.shuffle(rows)
    return rows

"""Labels lie on the answers and their end tokens, prompts are what generation sees, whatever the template."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from engine.data.examples import IGNORED, Example
from engine.data.formats import Conversation, Message
from engine.data.templates import encode, encode_prompt, encode_rows, resolve_template
from engine.errors import DatasetError

PAIR = (Message("user", "What is blue?"), Message("assistant", "the answer"))
TWO_TURNS = (*PAIR, Message("user", "Who?"), Message("assistant", "the blue"))
SYSTEM = Message("system", "Be brief.")
# The shape of templates that drop the thinking of earlier turns and add an empty block to the last.
THINKING = (
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
OPENED = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
)
STRICT = (
    "{% for m in messages %}{% if m['role'] == 'system' or (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('order') }}{% endif %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NO_END = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"


def labelled(example: Example, tokenizer: Any) -> str:
    return str(tokenizer.decode(example.labels[example.labels != IGNORED]))


def only(conversation: Conversation, tokenizer: Any, template: str = "auto", length: int = 512) -> Example:
    (example,) = encode(conversation, tokenizer, template, length).examples
    return example


@pytest.mark.parametrize("template", ["tokenizer", "plain"])
def test_all_answers_are_labelled_with_their_end_tokens(chatml: Any, template: str) -> None:
    example = only(Conversation(TWO_TURNS), chatml, template)
    space = " " if template == "plain" else ""
    assert labelled(example, chatml) == f"{space}the answer<|end|>{space}the blue<|end|>"


@pytest.mark.parametrize("template", ["tokenizer", "plain"])
def test_the_prompt_of_generation_is_the_beginning_of_training(chatml: Any, template: str) -> None:
    example = only(Conversation((SYSTEM, *PAIR)), chatml, template)
    prompt = encode_prompt([SYSTEM, PAIR[0]], chatml, template)
    assert example.input_ids[: len(prompt)].tolist() == prompt
    assert (example.labels[: len(prompt)] == IGNORED).all()
    assert (example.labels[len(prompt) :] == example.input_ids[len(prompt) :]).all()


def test_a_chat_in_dicts_gives_the_same_prompt(chatml: Any) -> None:
    assert encode_prompt([{"role": "user", "content": "Who?"}], chatml, "auto") == encode_prompt(
        [Message("user", "Who?")], chatml, "auto"
    )


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (THINKING, "<think></think>the blue<|end|>"),
        (OPENED, "the blue<|end|>"),
        (STRICT, "the answer<|end|>the blue<|end|>"),
    ],
)
def test_templates_without_the_prefix_property_label_the_last_answer(
    make_tokenizer: Any, template: str, expected: str
) -> None:
    tokenizer = make_tokenizer(template)
    assert labelled(only(Conversation(TWO_TURNS), tokenizer), tokenizer) == expected


def test_a_system_text_is_folded_where_a_template_takes_none(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(STRICT)
    text = tokenizer.decode(only(Conversation((SYSTEM, *PAIR)), tokenizer).input_ids)
    assert text == "<|user|>Be brief.\n\nWhat is blue?<|end|><|assistant|>the answer<|end|>"


def test_a_refused_chat_is_dropped_with_its_reason(make_tokenizer: Any) -> None:
    backwards = Conversation((PAIR[1], PAIR[1]))
    assert encode(backwards, make_tokenizer(STRICT), "auto", 64).reason == "refused by the chat template"


def test_a_refused_prompt_names_its_turns(make_tokenizer: Any) -> None:
    with pytest.raises(DatasetError, match=r"does not take turns in the order assistant\. Use template=plain\."):
        encode_prompt([PAIR[1]], make_tokenizer(STRICT), "auto")


def test_an_end_token_is_added_where_the_template_has_none(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(NO_END)
    assert labelled(only(Conversation(PAIR), tokenizer), tokenizer).endswith("the answer <|end|>")


def test_a_tokenizer_that_puts_a_space_first_labels_the_answer_once(shared: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories260k")
    example = only(Conversation(PAIR), tokenizer)
    whole = tokenizer("User: What is blue?\nAssistant: the answer</s>", add_special_tokens=False)["input_ids"]
    assert example.input_ids.tolist() == whole
    assert labelled(example, tokenizer) == "the answer</s>"


def test_a_cut_answer_is_counted_and_a_lone_prompt_dropped(chatml: Any) -> None:
    prompt = len(encode_prompt(PAIR[:1], chatml, "auto"))
    cut = encode(Conversation(PAIR), chatml, "auto", prompt + 1)
    assert (cut.reason, cut.examples[0].labelled_tokens) == ("cut", 1)
    gone = encode(Conversation(PAIR), chatml, "auto", prompt)
    assert (gone.reason, gone.examples) == ("too long", ())


def test_a_long_text_is_split_and_ends_once(bare: Any) -> None:
    ids = bare("the blue answer, the question" * 3, add_special_tokens=False)["input_ids"]
    examples = encode(Conversation(text="the blue answer, the question" * 3), bare, "auto", 8).examples
    assert [token for example in examples for token in example.labels] == [*ids, bare.eos_token_id]
    assert all(len(example.input_ids) == 8 for example in examples[:-1])


def test_a_passage_has_no_end_token(bare: Any) -> None:
    example = only(Conversation(text="the blue", ends=False), bare)
    assert bare.eos_token_id not in example.input_ids


def test_rows_together_are_the_rows_one_by_one(chatml: Any) -> None:
    chats = [Conversation(PAIR), Conversation(TWO_TURNS), Conversation((SYSTEM, *PAIR))]
    together = encode_rows(chats, chatml, "auto", 64)
    alone = [encode(chat, chatml, "auto", 64) for chat in chats]
    assert [row.examples[0].labels.tolist() for row in together] == [row.examples[0].labels.tolist() for row in alone]


def test_the_template_is_said_in_words(chatml: Any, bare: Any) -> None:
    assert resolve_template(chatml, "auto") == "the tokenizer's own"
    assert resolve_template(bare, "auto") == "plain (User: ... Assistant: ...)"
    with pytest.raises(DatasetError, match=r"got 'tokenizer'.*Use template=plain\."):
        resolve_template(bare, "tokenizer")


def test_texts_are_refused_a_template_that_no_chat_with_the_model_could_use(bare: Any) -> None:
    with pytest.raises(DatasetError, match=r"got 'tokenizer'.*Use template=plain\."):
        encode(Conversation((), text="blue"), bare, "tokenizer", 8)
    assert encode(Conversation((), text="blue"), bare, "auto", 8).examples
    assert encode_rows([], bare, "tokenizer", 8) == []  # labelled texts alone: no template is used, nor any chat

"""Rows of every known shape become conversations; rows that cannot are refused with their reason."""

from typing import Any

import pytest

from engine.data.columns import UnusableRowError
from engine.data.formats import Message, RowFormat, read_row, recognise
from engine.errors import DatasetError
from engine.spec import RunSpec

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
PAIR = (Message("user", "q"), Message("assistant", "a"))


def spec(**fields: Any) -> RunSpec:
    return RunSpec(model="demo", **fields)


def recognised(row: dict[str, Any], **fields: Any) -> RowFormat:
    return recognise("set", [*row], [row], spec(**fields))


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "q", "input": "", "output": "a"},
        {"prompt": "q", "completion": "a"},
        {"prompt": "q", "response": "a"},
        {"question": "q", "answer": "a"},
        {"Question": "q", "Answer": "a"},
        {"query": "q", "response": "a", "id": 7},
        {"input": "q", "output": "a"},
        {"task_id": "1", "prompt": "q", "canonical_solution": "a", "test": "t"},
        {"messages": CHAT},
        {"conversations": SHAREGPT, "tools": "[]"},
        {"messages": [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in CHAT]},
        {"messages": [{**turn, "content": [{"type": "text", "value": turn["content"]}]} for turn in CHAT]},
    ],
)
def test_every_known_row_becomes_question_and_answer(row: dict[str, Any]) -> None:
    assert read_row(row, recognised(row)).messages == PAIR


@pytest.mark.parametrize("row", [{"text": "t"}, {"content": "t"}, {"whatever": "t"}, {"id": 1, "text": "t"}])
def test_every_known_text_row_becomes_a_text(row: dict[str, Any]) -> None:
    assert read_row(row, recognised(row)).text == "t"


def test_input_follows_the_instruction_and_system_comes_first() -> None:
    row = {"system": "s", "instruction": "q", "input": "more", "output": "a"}
    assert read_row(row, recognised(row)).messages == (
        Message("system", "s"),
        Message("user", "q\n\nmore"),
        Message("assistant", "a"),
    )


def test_named_columns_override_recognition() -> None:
    row = {"question": "no", "answer": "no", "a": "q", "b": 4}
    found = recognised(row, columns={"instruction": "a", "output": "b"})
    assert read_row(row, found).messages == (Message("user", "q"), Message("assistant", "4"))


def test_one_named_column_is_completed_by_recognition() -> None:
    found = recognised({"stem": "q", "answer": "a"}, columns={"instruction": "stem"})
    assert found.columns == {"instruction": "stem", "output": "answer"}


def test_forced_format_wins_over_recognition() -> None:
    assert recognised({"question": "q", "answer": "a", "text": "t"}, dataset_format="text").kind == "text"


def test_tool_turns_are_user_turns_and_calls_are_answers() -> None:
    turns = [*SHAREGPT[:1], {"from": "function_call", "value": "f()"}, {"from": "observation", "value": "3"}]
    row = {"conversations": [*turns, {"from": "gpt", "value": "three"}], "tools": "f"}
    roles = [message.role for message in read_row(row, recognised(row)).messages]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert read_row(row, recognised(row)).messages[3].content == "Tool result:\n3"


def test_tool_calls_without_text_are_the_answer() -> None:
    calls = [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]
    row = {"messages": calls}
    assert read_row(row, recognised(row)).answer == '[{"name": "f"}]'


def test_turns_of_one_side_are_joined_and_loose_ends_left_out() -> None:
    row = {"messages": [CHAT[1], CHAT[0], CHAT[0], CHAT[1], CHAT[0]]}
    assert read_row(row, recognised(row)).messages == (Message("user", "q\n\nq"), Message("assistant", "a"))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "q", "answer": " "}, "empty answer"),
        ({"question": "q", "answer": None}, "empty answer"),
        ({"question": "", "answer": "a"}, "empty question"),
        ({"question": "q", "answer": ["a"]}, "not text"),
        ({"messages": CHAT[:1]}, "no assistant turn"),
        ({"messages": [CHAT[0], {"role": "assistant", "content": ""}]}, "empty answer"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "unknown role"),
        ({"messages": None}, "not a chat"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": "x"}]}]}, "not text"),
        ({"text": "\n"}, "empty text"),
    ],
)
def test_unusable_rows_say_why(row: dict[str, Any], reason: str) -> None:
    kinds = {"question": recognised({"question": "q", "answer": "a"}), "messages": recognised({"messages": CHAT})}
    row_format = kinds.get(next(iter(row))) or recognised({"text": "t"})
    with pytest.raises(UnusableRowError, match=f"^{reason}$"):
        read_row(row, row_format)


def test_unrecognised_columns_are_named_with_an_example() -> None:
    message = r"Dataset 'set' has no column to train on: found a, b\. .*columns=\{instruction: a, output: b\}\."
    with pytest.raises(DatasetError, match=message):
        recognised({"a": "x", "b": "y"})


def test_absent_named_column_is_named() -> None:
    with pytest.raises(DatasetError, match=r"has no column 'c', which columns names\. It has a, b\."):
        recognised({"a": "x", "b": "y"}, columns={"text": "c"})


def test_forced_format_without_its_columns_is_refused() -> None:
    with pytest.raises(DatasetError, match=r"no columns for messages rows: found text.*\{messages: text\}"):
        recognised({"text": "x"}, dataset_format="messages")

"""From a row of a dataset to a conversation or a text. Which columns matter is recognised from names and first rows.

instruction  a question column, an answer column, and maybe a further input and a system text
messages     a column of chats: role and content, or from and value; content a string or a list of typed parts
text         one column of plain text
             (one or two texts and a label: `labels.py`)

A chat is brought into the shape every chat template takes: a system text first or none, then user and assistant in
turns. What a tool says is a user turn under the heading "Tool result:"; a call of a tool is an assistant turn;
turns of one side that follow each other become one; assistant turns before the first user turn and user turns after
the last assistant turn are left out.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from engine.data.columns import UnusableRowError, cell_text, named
from engine.data.labels import Labels, find_labelled
from engine.errors import DatasetError
from engine.spec import Role, RunSpec

Kind = Literal["instruction", "messages", "text", "classification"]
Side = Literal["system", "user", "assistant"]

INSTRUCTION_NAMES = ("instruction", "prompt", "question", "query", "problem", "user", "input")
OUTPUT_NAMES = ("output", "completion", "response", "answer", "reply", "solution", "canonical_solution", "assistant")
INPUT_NAMES = ("input", "context")
SYSTEM_NAMES = ("system", "system_prompt", "tools")
MESSAGES_NAMES = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat")
TEXT_NAMES = ("text", "content", "document")

NO_SYSTEM = ("", "[]", "{}")  # a row without tools
TOOL = "tool"
SIDES: dict[str, str] = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt", "function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "tool_response", "function_response"), TOOL),
}


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: Side
    content: str


@dataclass(frozen=True)
class Conversation:
    """What one row says: a chat in `messages`, or, where that is empty, a plain text.

    `ends` tells whether the text ends here; a passage of a longer text does not.
    """

    messages: tuple[Message, ...] = ()
    text: str = ""
    ends: bool = True

    @property
    def question(self) -> str:
        """The last user turn; empty for a plain text."""
        return next((item.content for item in reversed(self.messages) if item.role == "user"), "")

    @property
    def answer(self) -> str:
        """The last assistant turn; empty for a plain text."""
        return next((item.content for item in reversed(self.messages) if item.role == "assistant"), "")


@dataclass(frozen=True)
class RowFormat:
    """How the rows of a dataset are read: which column plays which role; of classification, the labels."""

    kind: Kind
    columns: dict[Role, str]
    labels: Labels | None = None


def recognise(name: str, columns: Sequence[str], rows: Sequence[Mapping[str, Any]], spec: RunSpec) -> RowFormat:
    """Return how the rows of a dataset are read.

    Args:
        name: of the dataset, for the message.
        columns: all its columns.
        rows: its first rows, some 20.
        spec: `columns` names columns by role; `dataset_format` forces a kind.

    Raises:
        DatasetError: a named column is not there, or none can be trained on.
    """
    absent = [column for column in spec.columns.values() if column not in columns]
    if absent:
        raise DatasetError(
            f"Dataset {name!r} has no column {absent[0]!r}, which columns names. It has {', '.join(columns)}."
        )
    for kind in _kinds(spec):
        found = _FINDERS[kind](columns, rows, spec.columns)
        if found is not None:
            return RowFormat(kind, found)
    asked = "classification" if spec.task == "classification" else spec.dataset_format
    wanted = "column to train on" if asked == "auto" else f"columns for {asked} rows"
    labelled = asked == "auto" and find_labelled(columns, rows, {}) is not None
    raise DatasetError(
        f"Dataset {name!r} has no {wanted}: found {', '.join(columns)}. "
        f"{'Set task=classification for its labels, or name columns' if labelled else 'Name them'}, for example "
        f"columns={_example(columns, asked)}."
    )


def _example(columns: Sequence[str], wanted: str) -> str:
    first, last = columns[0], columns[-1]
    if wanted == "messages":
        return f"{{messages: {first}}}"
    if wanted == "classification":
        return f"{{text: {first}, label: {last}}}"
    if wanted == "text" or first == last:
        return f"{{text: {first}}}"
    return f"{{instruction: {first}, output: {last}}}"


def _kinds(spec: RunSpec) -> tuple[Kind, ...]:
    """The kinds to try: the one asked for, the one that the named roles belong to, or all."""
    if spec.task == "classification":
        return ("classification",)
    if spec.dataset_format != "auto":
        return (spec.dataset_format,)
    if "messages" in spec.columns:
        return ("messages",)
    if "text" in spec.columns:
        return ("text",)
    if {"instruction", "input", "output"} & spec.columns.keys():
        return ("instruction",)
    return ("messages", "instruction", "text")


def _plain(column: str, rows: Sequence[Mapping[str, Any]]) -> bool:
    return any(isinstance(row[column], (str, int, float)) for row in rows)


def _with_system(
    found: dict[Role, str], columns: Sequence[str], rows: Sequence[Mapping[str, Any]], given: Mapping[Role, str]
) -> dict[Role, str]:
    system = [column for column in named(SYSTEM_NAMES, columns, [*found.values()]) if _plain(column, rows)]
    chosen = given.get("system") or next(iter(system), None)
    return {**found, "system": chosen} if chosen else found


def _find_messages(
    columns: Sequence[str], rows: Sequence[Mapping[str, Any]], given: Mapping[Role, str]
) -> dict[Role, str] | None:
    chats = [column for column in named(MESSAGES_NAMES, columns) if any(isinstance(row[column], list) for row in rows)]
    column = given.get("messages") or next(iter(chats), None)
    return _with_system({"messages": column}, columns, rows, given) if column else None


def _find_instruction(
    columns: Sequence[str], rows: Sequence[Mapping[str, Any]], given: Mapping[Role, str]
) -> dict[Role, str] | None:
    plain = [column for column in columns if _plain(column, rows)]
    taken = [*given.values()]
    output = given.get("output") or next(iter(named(OUTPUT_NAMES, plain, taken)), None)
    question = given.get("instruction") or next(iter(named(INSTRUCTION_NAMES, plain, [*taken, output])), None)
    if output is None or question is None:
        return None
    found: dict[Role, str] = {"instruction": question, "output": output}
    further = given.get("input") or next(iter(named(INPUT_NAMES, plain, [*taken, question, output])), None)
    if further:
        found["input"] = further
    return _with_system(found, columns, rows, given)


def _find_text(
    columns: Sequence[str], rows: Sequence[Mapping[str, Any]], given: Mapping[Role, str]
) -> dict[Role, str] | None:
    strings = [column for column in columns if any(isinstance(row[column], str) for row in rows)]
    lone = strings if len(columns) == 1 else []
    column = given.get("text") or next(iter([*named(TEXT_NAMES, strings), *lone]), None)
    return {"text": column} if column else None


_FINDERS = {
    "messages": _find_messages,
    "instruction": _find_instruction,
    "text": _find_text,
    "classification": find_labelled,
}


def read_row(row: Mapping[str, Any], row_format: RowFormat, ends: bool = True) -> Conversation:
    """Return what a row says.

    Args:
        row: column to value.
        row_format: which column plays which role.
        ends: whether a plain text ends with its row.

    Raises:
        UnusableRowError: it has no answer, no text, or values that are no text.
    """
    columns = row_format.columns
    if row_format.kind == "text":
        text = cell_text(row[columns["text"]])
        if not text.strip():
            raise UnusableRowError("empty text")
        return Conversation(text=text, ends=ends)
    turns = _read_chat(row[columns["messages"]]) if row_format.kind == "messages" else _read_pair(row, columns)
    system = cell_text(row[columns["system"]]).strip() if "system" in columns else ""
    if system not in NO_SYSTEM:
        heading = "Tools:\n" if columns["system"].lower() == "tools" else ""
        turns.insert(0, Message("system", heading + system))
    return Conversation(_normalise(turns))


def _read_pair(row: Mapping[str, Any], columns: Mapping[Role, str]) -> list[Message]:
    parts = [cell_text(row[columns[role]]).strip() for role in ("instruction", "input") if role in columns]
    question = "\n\n".join(part for part in parts if part)
    answer = cell_text(row[columns["output"]])
    if not question:
        raise UnusableRowError("empty question")
    if not answer.strip():
        raise UnusableRowError("empty answer")
    return [Message("user", question), Message("assistant", answer)]


def _read_chat(value: Any) -> list[Message]:
    if not isinstance(value, list):
        raise UnusableRowError("not a chat")
    return [_read_turn(turn) for turn in value]


def _read_turn(turn: Any) -> Message:
    if not isinstance(turn, Mapping):
        raise UnusableRowError("not a chat")
    side = SIDES.get(str(turn.get("role") or turn.get("from")).lower())
    if side is None:
        raise UnusableRowError("unknown role")
    body = _content(turn.get("content") if turn.get("content") is not None else turn.get("value"))
    if not body.strip() and turn.get("tool_calls"):
        body = json.dumps(turn["tool_calls"], ensure_ascii=False)
    if side == TOOL:
        return Message("user", f"Tool result:\n{body}")
    return Message("system" if side == "system" else "user" if side == "user" else "assistant", body)


def _content(value: Any) -> str:
    """The text of a turn: a string, or a list of parts such as {"type": "text", "text": ...}."""
    if not isinstance(value, list):
        return cell_text(value)
    texts = [part if isinstance(part, str) else _part(part) for part in value]
    return "".join(texts)


def _part(part: Any) -> str:
    text = (part.get("text") or part.get("value")) if isinstance(part, Mapping) else None
    if not isinstance(text, str):
        raise UnusableRowError("not text")
    return text


def _normalise(turns: Sequence[Message]) -> tuple[Message, ...]:
    """Bring turns into the order: system or none, user, assistant, user, assistant, ..."""
    merged: list[Message] = []
    for turn in turns:
        spoken = any(item.role != "system" for item in merged)
        if not turn.content.strip() or (turn.role == "assistant" and not spoken):
            continue
        role: Side = "user" if turn.role == "system" and spoken else turn.role
        if merged and merged[-1].role == role:
            merged[-1] = Message(role, f"{merged[-1].content}\n\n{turn.content}")
        else:
            merged.append(Message(role, turn.content))
    while merged and merged[-1].role != "assistant":
        merged.pop()
    if not merged:
        asked = any(turn.role == "assistant" and not turn.content.strip() for turn in turns)
        raise UnusableRowError("empty answer" if asked else "no assistant turn")
    return tuple(merged)

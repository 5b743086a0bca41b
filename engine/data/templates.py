"""From a conversation to token ids and labels, through the tokenizer's chat template or a plain one.

Labelled are the tokens that the model writes: each assistant turn with its end token. To find them in whatever a
template renders, the chat is rendered up to before and up to after each assistant turn; the answer is the difference.
Where these are no prefixes of the whole (templates that drop the thinking of earlier turns), only the last answer
is labelled. The prompt's tokens are those that a chat with the model feeds: the prompt rendered, then tokenised.

Plain template: "User: question\\nAssistant: answer" and the end token.
Plain text: every token is labelled; a long text becomes several examples, with the end token after its last.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jinja2
import numpy as np

from engine.data.columns import UnusableRowError
from engine.data.examples import IGNORED, Example
from engine.data.formats import Conversation, Message
from engine.errors import DatasetError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Chat = list[dict[str, str]]
Piece = tuple[str, bool]  # a stretch of the rendered text, and whether it is an answer
Render = Callable[[Chat, bool], str]

TOO_LONG, CUT, REFUSED = "too long", "cut", "refused by the chat template"


@dataclass(frozen=True)
class Encoded:
    """One row, tokenised. `reason` is empty, `CUT` for a shortened row, or why there are no examples."""

    examples: tuple[Example, ...]
    reason: str = ""


@dataclass(frozen=True)
class _Ends:
    """The tokens that may end a turn, and the one that ends a text."""

    tokens: tuple[str, ...]
    eos: str


def uses_plain(tokenizer: "PreTrainedTokenizerBase", template: str) -> bool:
    """Return whether chats are written in the plain template.

    Raises:
        DatasetError: the tokenizer's own is asked for, and it has none.
    """
    if template == "tokenizer" and not tokenizer.chat_template:
        raise DatasetError(
            "template must be one that the model has, got 'tokenizer', and this model's tokenizer has no chat "
            "template. Use template=plain."
        )
    return template == "plain" or not tokenizer.chat_template


def resolve_template(tokenizer: "PreTrainedTokenizerBase", template: str) -> str:
    """Return the template in words, for the event.

    Raises:
        DatasetError: the tokenizer's own is asked for, and it has none.
    """
    return "plain (User: ... Assistant: ...)" if uses_plain(tokenizer, template) else "the tokenizer's own"


def encode_prompt(
    messages: Sequence[Message] | Sequence[Mapping[str, str]], tokenizer: "PreTrainedTokenizerBase", template: str
) -> list[int]:
    """Return the ids after which the model writes its answer to the last message.

    Raises:
        DatasetError: the chat template does not take these messages, or there is none.
    """
    chat = [_as_dict(message) for message in messages]
    plain = uses_plain(tokenizer, template)
    try:
        text = _renderer(tokenizer, plain)(chat, True)
    except UnusableRowError:
        roles = ", ".join(message["role"] for message in chat)
        raise DatasetError(
            f"The model's chat template does not take turns in the order {roles}. Use template=plain."
        ) from None
    return [*(_lead(tokenizer) if plain else []), *_tokenise(tokenizer, [text])[0]]


def encode(
    conversation: Conversation, tokenizer: "PreTrainedTokenizerBase", template: str, sequence_length: int
) -> Encoded:
    """Return the examples of one row; see `encode_rows`."""
    return encode_rows([conversation], tokenizer, template, sequence_length)[0]


def encode_rows(
    conversations: Sequence[Conversation],
    tokenizer: "PreTrainedTokenizerBase",
    template: str,
    sequence_length: int,
) -> list[Encoded]:
    """Return the examples of several rows, tokenised together. All are chats, or all are texts.

    A chat is one example, cut at `sequence_length` tokens, or none where no label is left. A text is one example for
    each `sequence_length` tokens.

    Raises:
        DatasetError: the tokenizer's own template is asked for, and it has none.
    """
    if not conversations:
        return []
    plain = uses_plain(tokenizer, template)  # asked of texts too: a chat with the model will need one
    if not conversations[0].messages:
        return _encode_texts(conversations, tokenizer, sequence_length)
    render, lead = _renderer(tokenizer, plain), _lead(tokenizer) if plain else []
    ends = _Ends((*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()), str(tokenizer.eos_token or ""))
    rendered = [_try_pieces(conversation, render, ends) for conversation in conversations]
    token_rows = iter(_tokenise_pieces(tokenizer, [pieces for pieces in rendered if pieces]))
    return [
        _cut(lead, next(token_rows), pieces, sequence_length) if pieces else Encoded((), REFUSED) for pieces in rendered
    ]


def _encode_texts(
    conversations: Sequence[Conversation], tokenizer: "PreTrainedTokenizerBase", sequence_length: int
) -> list[Encoded]:
    lead, end = _lead(tokenizer), tokenizer.eos_token_id
    encoded = []
    for item, ids in zip(conversations, _tokenise(tokenizer, [item.text for item in conversations]), strict=True):
        whole = np.array([*lead, *ids, *([end] if item.ends and end is not None else [])], dtype=np.int32)
        chunks = [whole[start : start + sequence_length] for start in range(0, len(whole), sequence_length)]
        # A chunk of one token predicts nothing.
        examples = tuple(Example(chunk, chunk) for chunk in chunks if len(chunk) > 1)
        encoded.append(Encoded(examples, "" if examples else "empty text"))
    return encoded


def _cut(lead: list[int], ids: list[list[int]], pieces: Sequence[Piece], sequence_length: int) -> Encoded:
    parts = [(lead, False), *((part, answer) for part, (_, answer) in zip(ids, pieces, strict=True))]
    input_ids = np.array([token for part, _ in parts for token in part], dtype=np.int32)
    answers = np.array([answer for part, answer in parts for _ in part], dtype=bool)
    labels = np.where(answers, input_ids, np.int32(IGNORED))
    example = Example(input_ids[:sequence_length], labels[:sequence_length])
    if not example.labelled_tokens:
        return Encoded((), TOO_LONG)
    return Encoded((example,), CUT if len(input_ids) > sequence_length else "")


def _as_dict(message: Message | Mapping[str, str]) -> dict[str, str]:
    if isinstance(message, Message):
        return {"role": message.role, "content": message.content}
    return {"role": message["role"], "content": message["content"]}


def _lead(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The begin token, where the tokenizer puts one before a text."""
    begin = tokenizer.bos_token_id
    ids: list[int] = tokenizer("a")["input_ids"]
    return [begin] if begin is not None and ids[:1] == [begin] else []


def _tokenise(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer([*texts], add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _renderer(tokenizer: "PreTrainedTokenizerBase", plain: bool) -> Render:
    """Return a function from a chat, and whether an answer shall follow, to text."""
    if plain:
        end = str(tokenizer.eos_token or "")
        return lambda chat, prompt: _render_plain(chat, prompt, end)
    return lambda chat, prompt: _render_own(chat, prompt, tokenizer)


def _render_plain(chat: Chat, prompt: bool, end: str) -> str:
    forms = {"system": "{}\n\n", "user": "User: {}\n", "assistant": f"Assistant: {{}}{end}\n"}
    # Blanks before the first word stay: they are part of code.
    text = "".join(forms[message["role"]].format(message["content"].strip("\n").rstrip()) for message in chat)
    return f"{text}Assistant:" if prompt else text


def _render_own(chat: Chat, prompt: bool, tokenizer: "PreTrainedTokenizerBase") -> str:
    def render(messages: Chat) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))

    try:
        return render(chat)
    except jinja2.TemplateError:
        folded = _fold_system(chat)
    try:
        return render(folded)
    except jinja2.TemplateError:
        raise UnusableRowError(REFUSED) from None


def _fold_system(chat: Chat) -> Chat:
    """Put the system text into the first user turn, for templates that take no system turn."""
    if len(chat) < 2 or chat[0]["role"] != "system":
        return chat
    first = {"role": chat[1]["role"], "content": f"{chat[0]['content']}\n\n{chat[1]['content']}"}
    return [first, *chat[2:]]


def _try_pieces(conversation: Conversation, render: Render, ends: _Ends) -> list[Piece]:
    """The rendered chat in pieces; empty where the template refuses it."""
    chat = [_as_dict(message) for message in conversation.messages]
    try:
        pieces = _split(chat, render, ends)
    except UnusableRowError:
        return []
    last = pieces[-1][0]
    if not last.endswith(ends.tokens):
        pieces[-1] = (last + ends.eos, True)
    return pieces


def _split(chat: Chat, render: Render, ends: _Ends) -> list[Piece]:
    whole, pieces, position = render(chat, False), list[Piece](), 0
    for place in (place for place, message in enumerate(chat) if message["role"] == "assistant"):
        prompt = render(chat[:place], True)
        answered = render(chat[: place + 1], False) if place + 1 < len(chat) else whole
        if not (answered.startswith(prompt) and whole.startswith(answered)):
            return _split_last(chat, whole, render, ends)
        answer = _without_tail(answered[len(prompt) :], ends)
        pieces += [(whole[position : len(prompt)], False), (answer, True)]
        position = len(prompt) + len(answer)
    return pieces


def _split_last(chat: Chat, whole: str, render: Render, ends: _Ends) -> list[Piece]:
    prompt, content = render(chat[:-1], True), chat[-1]["content"].strip()
    # A generation prompt may hold more than the whole does (an opened thinking block): the answer is what is said.
    start = len(prompt) if whole.startswith(prompt) else whole.rfind(content)
    answer = whole[start:] if start >= 0 else content
    return [(prompt, False), (_without_tail(answer, ends), True)]


def _without_tail(answer: str, ends: _Ends) -> str:
    """Cut what a template writes after the end token: generation never gets there."""
    stripped = answer.rstrip()
    return stripped if stripped.endswith(ends.tokens) else answer


def _tokenise_pieces(tokenizer: "PreTrainedTokenizerBase", rows: Sequence[Sequence[Piece]]) -> list[list[list[int]]]:
    """Return the ids of each piece of each row, such that they are those of the row tokenised whole."""
    if not rows:
        return []
    texts = [text for pieces in rows for text in (*(text for text, _ in pieces), "".join(text for text, _ in pieces))]
    ids = iter(_tokenise(tokenizer, texts))
    tokenised = []
    for pieces in rows:
        parts, whole = [next(ids) for _ in pieces], next(ids)
        joined = [token for part in parts for token in part]
        # Some tokenizers put a space before every text they are given: then the pieces come from growing texts.
        tokenised.append(parts if joined == whole else _tokenise_growing(tokenizer, pieces))
    return tokenised


def _tokenise_growing(tokenizer: "PreTrainedTokenizerBase", pieces: Sequence[Piece]) -> list[list[int]]:
    texts = [text for text, _ in pieces]
    growing = _tokenise(tokenizer, ["".join(texts[: count + 1]) for count in range(len(texts))])
    parts = [growing[0]]
    for text, before, ids in zip(texts[1:], growing[:-1], growing[1:], strict=True):
        # Tokens may merge across a border; generation starts after the prompt's own tokens.
        same = ids[: len(before)] == before
        parts.append(ids[len(before) :] if same else _tokenise(tokenizer, [text])[0])
    return parts

"""Chat with the base and the tuned model of a run: one copy of the weights, the result put in and taken out.

`main` is the chat worker: it reads a JSON request a line and answers with JSON lines; see `workers.ChatProcess`.
"""

import json
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TextIO

import torch
from transformers import StoppingCriteria, TextStreamer

from engine.classify import answer_words, classify_text
from engine.data.labels import Labels, split_pair
from engine.data.templates import encode_prompt
from engine.data.token_ids import padding_id, require_rows, rows_of
from engine.errors import EngineError
from engine.export import spec_as_run
from engine.hardware import resolve_device
from engine.models import device_of, load_tokenizer
from engine.runs import Run, device_lock, take_lock
from engine.sparse.delta import read_info
from engine.train.results import apply_result, load_base

SIDES = ("base", "tuned")
HEADLESS = "The base has no trained head for these labels, so only the tuned model answers."


class _Growing(TextStreamer):
    """Calls back with the whole answer so far at each piece of text."""

    def __init__(self, tokenizer: Any, told: Callable[[str, bool], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._told = told
        self._text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Take a piece of text from transformers."""
        self._text += text
        self._told(self._text, stream_end)


class _Cancelled(StoppingCriteria):
    """Ends the generation when the person has stopped listening."""

    def __init__(self, cancelled: Callable[[], bool]) -> None:
        self._cancelled = cancelled

    def __call__(self, input_ids: torch.Tensor, _scores: Any, **_options: Any) -> torch.Tensor:
        """Return, for each row of `input_ids`, whether to stop."""
        return torch.full((input_ids.shape[0],), self._cancelled(), dtype=torch.bool, device=input_ids.device)


class ChatModel:
    """The model of a run with its result; answers as the base or as the tuned model."""

    def __init__(self, run: Run) -> None:
        """Load the base model and apply the result.

        A GPU on which a run is at work is left to it: chat then uses the CPU, in the dtype of the run all the same,
        in which an NF4 base was quantised. A GPU that is free is the chat's as long as its process lives: runs wait.

        Raises:
            EngineError: the model or the result cannot be loaded.
        """
        self._spec = spec_as_run(run)
        device = resolve_device(self._spec.device)
        self._turn = device_lock(run.path.parent, device.name)
        busy = not device.is_cpu and not take_lock(self._turn)
        self._tokenizer = load_tokenizer(self._spec)
        names = read_info(run.delta_path).labels
        self._labels = None if names is None else Labels(names)
        self._model = load_base(self._spec, device_of("cpu" if busy else device.name), names)
        self._result = apply_result(self._model, run.delta_path)
        self._applied = True

    def answer(
        self,
        side: str,
        messages: list[dict[str, str]],
        told: Callable[[str, bool], None],
        *,
        max_new_tokens: int,
        temperature: float,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        """Generate the answer of one side; of a classification, say the labels of the last message.

        Args:
            side: `base` or `tuned`.
            messages: the chat, the last message the user's.
            told: called with the answer so far, and whether it is whole.
            max_new_tokens: longest answer in tokens.
            temperature: 0 is greedy.
            cancelled: asked at each token.
        """
        self._switch(applied=side == "tuned")
        if self._labels is not None:
            told(self._classified(side, messages[-1]["content"], self._labels), True)
            return
        prompt = encode_prompt(messages, self._tokenizer, self._spec.template)
        context = getattr(self._model.config, "max_position_embeddings", None) or sys.maxsize
        if len(prompt) >= context:
            raise EngineError(
                f"This chat is {len(prompt):,} tokens long and the model reads {context:,}. "
                "Clear it, or ask less at once."
            )
        known = rows_of(self._model)
        require_rows(max(prompt, default=-1), known, self._spec.model)
        ids = torch.tensor([prompt], device=self._model.device)
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature}
        generate: Any = self._model.generate
        generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=min(max_new_tokens, context - len(prompt)),
            pad_token_id=padding_id(self._tokenizer, known),
            streamer=_Growing(self._tokenizer, told),
            stopping_criteria=[_Cancelled(cancelled)],
            **sampling,
        )

    def _classified(self, side: str, line: str, labels: Labels) -> str:
        if side == "base":
            return HEADLESS
        return answer_words(
            classify_text(self._model, self._tokenizer, split_pair(line), self._spec.sequence_length), labels
        )

    def _switch(self, *, applied: bool) -> None:
        if applied != self._applied:
            self._result(applied)
            self._applied = applied


def main(run: Run, requests: TextIO = sys.stdin, answers: TextIO = sys.stdout) -> int:
    """Answer requests until their stream ends; return the process's exit status."""
    incoming: queue.Queue[dict[str, Any] | None] = queue.Queue()
    threading.Thread(target=_listen, args=(requests, incoming), daemon=True).start()

    def say(body: dict[str, Any]) -> None:
        answers.write(json.dumps(body, ensure_ascii=False) + "\n")
        answers.flush()

    model: ChatModel | None = None
    for request in _asked(incoming):
        try:
            model = model or ChatModel(run)
            _answer_both(model, request, say, lambda: not incoming.empty())
            say({"end": True})
        except EngineError as error:
            say({"error": str(error)})
        except (RuntimeError, ValueError) as error:
            say({"error": f"The model could not answer ({type(error).__name__}: {error}). Start a new chat."})
    return 0


def _listen(requests: TextIO, incoming: "queue.Queue[dict[str, Any] | None]") -> None:
    for line in requests:
        incoming.put(json.loads(line))
    incoming.put(None)


def _asked(incoming: "queue.Queue[dict[str, Any] | None]") -> Iterator[dict[str, Any]]:
    while (request := incoming.get()) is not None:
        if "cancel" not in request:
            yield request


def _answer_both(
    model: ChatModel, request: dict[str, Any], say: Callable[[dict[str, Any]], None], cancelled: Callable[[], bool]
) -> None:
    for side in SIDES:
        if side in request["history"] and not cancelled():
            model.answer(
                side,
                request["history"][side],
                lambda text, done, side=side: say({"side": side, "text": text, "done": done}),  # type: ignore[misc]
                max_new_tokens=request["max_new_tokens"],
                temperature=request["temperature"],
                cancelled=cancelled,
            )

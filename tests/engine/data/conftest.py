"""Fixtures of the data path: a cache of its own, files to read, and small tokenizers with chat templates."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
WORDS = ["User", "Assistant", "What", "Who", "blue", "answer", "question", "the", "Ġthe", "Ġblue", "Ġanswer"]
Write = Callable[[str, Any], str]
MakeTokenizer = Callable[[str | None], PreTrainedTokenizerFast]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("SPARSE_TUNING_HUB", "offline")


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a file under a temporary folder: rows as JSON or JSONL by the name's suffix, text and bytes as given."""

    def write_file(name: str, content: Any) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list) and name.endswith(".jsonl"):
            content = "".join(json.dumps(row) + "\n" for row in content)
        elif not isinstance(content, (str, bytes)):
            content = json.dumps(content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write_file


def _byte_tokenizer() -> Tokenizer:
    """Byte-level BPE with one token for each of a few words, whatever else as bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: place for place, letter in enumerate(letters)}
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                vocabulary[word[:end]] = len(vocabulary)
                merges.append((word[: end - 1], word[end - 1]))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.fixture
def make_tokenizer() -> MakeTokenizer:
    """Return a function from a chat template, or None, to a tokenizer with `<|end|>` as its end token."""

    def make(template: str | None) -> PreTrainedTokenizerFast:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=_byte_tokenizer(),
            eos_token="<|end|>",
            pad_token="<|pad|>",
            extra_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        )
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture
def chatml(make_tokenizer: MakeTokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer with a template like ChatML."""
    return make_tokenizer(CHATML)


@pytest.fixture
def bare(make_tokenizer: MakeTokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer without a chat template."""
    return make_tokenizer(None)

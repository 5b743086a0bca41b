"""Fixtures shared by all tests: seeds, a tiny model, the folder of real data beside the project where there is one."""

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other
SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What runs measure here is kept apart from what the user's own runs measured."""
    os.environ["SPARSE_TUNING_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def shared() -> Path:
    """The folder of real models and datasets; the test skips where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("no folder of real data beside the project")
    return SHARED


def _llama(vocabulary: int, positions: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    """A random Llama of two layers, 64 wide, 128 tokens, untied."""
    return _llama(128, 64)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama and a tokenizer of bytes with a chat template."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    specials = ["<|end|>", "<|user|>", "<|assistant|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>", additional_special_tokens=specials[1:]
    )
    fast.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    _llama(len(fast), 256).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def dataset_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sums to learn: train.jsonl with 60 rows and test.jsonl with 8, as instruction and output."""
    folder = tmp_path_factory.mktemp("sums")
    rng = random.Random(0)
    for name, count in (("train", 60), ("test", 8)):
        rows: list[dict[str, Any]] = []
        for _ in range(count):
            left, right = rng.randrange(50), rng.randrange(50)
            rows.append({"instruction": f"{left} + {right}", "output": str(left + right)})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder

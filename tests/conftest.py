"""Fixtures shared by all tests: seeds, a tiny model, the folder of real data beside the project where there is one.

They import the libraries themselves: the process that only hands out the tests would take five seconds for it.
"""

import json
import os
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

# The models are tiny: more threads only wait for each other. Before torch is imported, and for processes begun here.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    import torch

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


def _llama(vocabulary: int, positions: int) -> "LlamaForCausalLM":
    from transformers import LlamaConfig, LlamaForCausalLM

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
def tiny_llama() -> "LlamaForCausalLM":
    """A random Llama of two layers, 64 wide, 128 tokens, untied."""
    return _llama(128, 64)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama and a tokenizer of bytes with a chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

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


COLOURS = ("red", "green", "blue", "grey")


@pytest.fixture(scope="session", params=["bert", "roberta"])
def encoder_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random encoder without dropout and a tokenizer of words that knows pairs: BERT, then RoBERTa.

    BERT's weights hold a pooler, RoBERTa's are those of its masked language model.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM

    folder = tmp_path_factory.mktemp("encoders") / str(request.param)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "is", "it", "not", "the", "same", *COLOURS]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    second = 1 if request.param == "bert" else 0
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair=f"[CLS] $A [SEP] $B:{second} [SEP]:{second}",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    specials = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=48, model_input_names=inputs, **specials
    ).save_pretrained(folder)
    sizes = {"vocab_size": len(words), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.2}
    torch.manual_seed(0)
    if request.param == "bert":
        BertModel(BertConfig(**sizes, **still)).save_pretrained(folder)
    else:
        RobertaForMaskedLM(RobertaConfig(**sizes, **still, type_vocab_size=1)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pairs_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A phrase and a colour, warm or cold: train.jsonl with 64 rows and test.jsonl with 16."""
    folder = tmp_path_factory.mktemp("pairs")
    rng = random.Random(0)
    for name, count in (("train", 64), ("test", 16)):
        rows = []
        for _ in range(count):
            colour = rng.choice(COLOURS)
            label = "warm" if colour in COLOURS[:2] else "cold"
            rows.append({"sentence1": "is it " + "not " * rng.randrange(2), "sentence2": colour, "label": label})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
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

"""Model folders that hold a config.json only: enough to plan."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LLAMA_7B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}


@pytest.fixture
def config_folder(tmp_path: Path) -> Callable[..., str]:
    """Write a config.json, Llama-7B's but for the fields given, and return its folder."""

    def write(**fields: Any) -> str:
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(LLAMA_7B | fields))
        return str(folder)

    return write

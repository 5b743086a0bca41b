"""What the config class of a family takes for a number that config.json leaves out, as of transformers 5.23.

Only numbers whose absence would otherwise be read as another model. What says how large a model is (its width, blocks,
heads and vocabulary) has to be there, but in the language model of Gemma 3, whose files leave it out.
"""

from collections.abc import Mapping
from typing import Any

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {"intermediate_size": 11_008},
    "mistral": {"intermediate_size": 14_336, "num_key_value_heads": 8, "sliding_window": 4096},
    "mixtral": {
        "intermediate_size": 14_336,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "qwen2": {"intermediate_size": 22_016, "num_key_value_heads": 32, "use_sliding_window": False},
    "qwen3": {"intermediate_size": 22_016, "num_key_value_heads": 32, "head_dim": 128, "use_sliding_window": False},
    "qwen3_moe": {
        "moe_intermediate_size": 768,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "use_sliding_window": False,
    },
    "granite": {"intermediate_size": 11_008},
    "smollm3": {"intermediate_size": 11_008, "num_key_value_heads": 4, "use_sliding_window": False},
    "gemma": {"intermediate_size": 24_576, "num_key_value_heads": 16, "head_dim": 256},
    "gemma2": {"intermediate_size": 9216, "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096},
    "gemma3_text": {  # the files of the 4B model rely on it
        "vocab_size": 262_208,
        "intermediate_size": 9216,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 4096,
    },
    "phi": {"intermediate_size": 8192},
    "phi3": {"intermediate_size": 8192},
    "gpt_neox": {"intermediate_size": 24_576},
}

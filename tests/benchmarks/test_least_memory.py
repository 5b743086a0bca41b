"""The least limit, searched and replayed, in small."""

import pytest
import torch

from benchmarks.least_memory import CELLS, METHODS, NF4, RANK_64, Cell, attempt, replayed, search

SMALL = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
}
SMALL |= {"num_key_value_heads": 4, "pad_token_id": None}
SHORT = {"sequence_length": 32}


@pytest.mark.parametrize("guess", [1, 7, 40, 200])
@pytest.mark.parametrize("least", [1, 6, 41, 58])
def test_the_least_limit_is_found_from_any_guess_in_few_tries(least: int, guess: int) -> None:
    tried: list[int] = []

    def succeeds(limit: int) -> bool:
        tried.append(limit)
        return limit >= least

    assert search(succeeds, guess) == least
    assert len(tried) == len(set(tried))
    assert len(tried) <= 2 + 2 * max(1, abs(guess - least)).bit_length()


@pytest.mark.parametrize("method", METHODS)
def test_three_steps_with_a_reselection_are_really_trained(method: str) -> None:
    cell = Cell("small", "huggyllama/llama-7b", {method: 1.0}, {**NF4, **SHORT, "dtype": "float32"}, SMALL)
    assert attempt(cell, method, None, torch.device("cpu"))


def test_a_replayed_limit_holds_all_parts_of_the_peak() -> None:
    dense, packed = (
        replayed(
            Cell("small", "huggyllama/llama-7b", {"spiel-ma": 0.5}, fields, SMALL | {"hidden_size": 2048}), "spiel-ma"
        )
        for fields in ({}, NF4)
    )
    for row in (dense, packed):
        assert row["device"] == "replayed"
        assert sum(row["parts"].values()) <= row["gib"] == pytest.approx(row["ratio"] * row["goal_gib"])
    assert packed["parts"]["parameters"] < dense["parts"]["parameters"]


def test_cells_of_table_3_stand_beside_what_was_published() -> None:
    """And train as many entries as LoRA of rank 64, to 0.1 percent."""
    cell = CELLS["13B NF4 of Table 3, checkpointed"]
    assert cell.goals_gib == {"spiel-ag": 19, "spiel-ma": 14}
    spec = cell.spec("folder", "spiel-ag")
    assert (spec.quantization, spec.gradient_checkpointing, spec.sequence_length) == ("nf4", True, 2048)
    for size, width, ffn in (("7b", 4096, 11008), ("13b", 5120, 13824)):
        lora, numel = 64 * (4 * 2 * width + 3 * (width + ffn)), 4 * width**2 + 3 * width * ffn
        assert RANK_64[size] == pytest.approx(lora / numel, rel=1e-3)

"""The least limit, searched and replayed, in small."""

import pytest
import torch

from benchmarks.least_memory import METHODS, NF4, Cell, attempt, replayed, search

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
    cell = Cell("small", "huggyllama/llama-7b", 1.0, {**NF4, **SHORT, "dtype": "float32"}, SMALL)
    assert attempt(cell, method, None, torch.device("cpu"))


def test_a_replayed_limit_holds_all_parts_of_the_peak() -> None:
    dense, packed = (
        replayed(Cell("small", "huggyllama/llama-7b", 0.5, fields, SMALL | {"hidden_size": 2048}), "spiel-ma")
        for fields in ({}, NF4)
    )
    for row in (dense, packed):
        assert row["device"] == "replayed"
        assert sum(row["parts"].values()) <= row["gib"] == pytest.approx(row["ratio"] * row["goal_gib"])
    assert packed["parts"]["parameters"] < dense["parts"]["parameters"]

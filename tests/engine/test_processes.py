"""The environment of workers: what it gives by default, and that a person's own settings stand."""

import pytest

from engine.processes import worker_environment


def test_cards_have_the_numbers_of_nvml_unless_a_person_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    assert worker_environment()["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    assert worker_environment()["CUDA_DEVICE_ORDER"] == "FASTEST_FIRST"


def test_attention_on_any_card_is_the_one_that_is_planned_with_unless_a_person_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TORCH_CUDNN_SDPA_DEPRIORITIZED", raising=False)
    assert worker_environment()["TORCH_CUDNN_SDPA_DEPRIORITIZED"] == "1"
    monkeypatch.setenv("TORCH_CUDNN_SDPA_DEPRIORITIZED", "0")
    assert worker_environment()["TORCH_CUDNN_SDPA_DEPRIORITIZED"] == "0"

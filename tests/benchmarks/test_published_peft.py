"""The plan of steps whose memory others measured on a GPU."""

from benchmarks.published_peft import LONGEST, MODEL, READINGS, longest_batch, planned_bytes
from benchmarks.random_models import config_folder


def test_plans_are_near_what_a_gpu_reserved() -> None:
    with config_folder(MODEL) as folder:
        length = longest_batch(folder)
        held_out = [reading for name, reading in READINGS.items() if name != "LoRA 32"]
        ratios = [planned_bytes(folder, length, reading) / reading.reserved_bytes for reading in held_out]
    assert length < LONGEST
    assert all(0.97 < ratio < 1.03 for ratio in ratios), ratios

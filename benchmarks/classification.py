"""Methods on a classification with a real encoder: `python -m benchmarks.classification --model FOLDER --data FOLDER`.

Does an answer belong to its question? Pairs of a folder with train.jsonl and test.jsonl (question, answer), such as
GSM8K's, matched or shuffled. SIFT, random entries and LoRA train the same number of values of q, k, v and o beside the
head, full all of them, as in the SIFT paper's Table 2 (arXiv:2312.11875).
Each method gets the same tries of the learning rate, judged on rows that are neither trained on nor tested; then mean
and spread of the test accuracy over seeds.
"""

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from engine.data.batches import PreparedData, prepare_data
from engine.models import load_classifier, load_tokenizer
from engine.spec import RunSpec
from engine.train.head import HeadedTuning
from engine.train.loop import Trainer
from engine.train.memory import MemoryMeter
from engine.train.tuning import start_tuning

METHODS = ("lora", "sift", "random", "full")  # LoRA's rank 1 sets the number of values for those after it
# Around what was best on MiniLM-L6 in a first search (full: a guess); as many tries for each.
RATES = {"lora": 9e-3, "sift": 3e-3, "random": 3e-3, "full": 3e-4}
FACTORS = (0.3, 1.0, 3.0)
LENGTH, ROWS, STEPS = 64, 16, 30  # tokens, rows of a step, steps
TRAINED, VALIDATED, TESTED = 400, 100, 200  # rows


class _Unasked:
    def stop_requested(self) -> bool:
        return False

    def checkpoint_requested(self) -> bool:
        return False


def pairs(rows: Sequence[dict[str, str]], seed: int) -> list[dict[str, Any]]:
    """Return a labelled pair of each row: half with their own answer (1), half with that of the row after it (0)."""
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    half = len(order) // 2
    matched = [{"question": rows[at]["question"], "answer": rows[at]["answer"], "label": 1} for at in order[:half]]
    others = order[half + 1 :] + order[half : half + 1]
    shuffled = [
        {"question": rows[at]["question"], "answer": rows[other]["answer"], "label": 0}
        for at, other in zip(order[half:], others, strict=True)
    ]
    return matched + shuffled


def write_parts(data: Path, folder: Path) -> None:
    """Write `search` (rows to train on and to choose the rate by) and `final` (the same and rows to test)."""
    rows = {part: _read(data / f"{part}.jsonl") for part in ("train", "test")}
    parts = {
        "train": pairs(rows["train"][:TRAINED], 0),
        "validation": pairs(rows["train"][TRAINED : TRAINED + VALIDATED], 1),
        "test": pairs(rows["test"][:TESTED], 2),
    }
    for name, held_out in (("search", "validation"), ("final", "test")):
        (folder / name).mkdir()
        for part in ("train", held_out):
            text = "".join(json.dumps(row) + "\n" for row in parts[part])
            (folder / name / f"{part}.jsonl").write_text(text, encoding="utf-8")


def _read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def train(spec: RunSpec, data: PreparedData) -> dict[str, float]:
    """Train once; return held-out loss and accuracy with the numbers of trained values and of the head."""
    torch.manual_seed(spec.seed)
    assert data.labels is not None
    device = torch.device("cpu")
    model, head = load_classifier(spec, device, data.labels.names)
    tuning = HeadedTuning(start_tuning(model, spec, head), model, head, data.labels.names, spec)
    trainer = Trainer(
        spec,
        model,
        load_tokenizer(spec),
        data,
        tuning,
        tuning.make_optimizer(),
        lambda _: None,
        _Unasked(),
        lambda _: None,
        MemoryMeter(device),
    )
    trainer.run()
    figures = trainer.evaluate(0, scored=True)
    assert figures is not None
    return {
        "accuracy": figures.metrics["accuracy"],
        "loss": figures.loss,
        "trained": tuning.num_active,
        "head": tuning.head_numel,
    }


def measure(method: str, trained: int, model: str, folder: Path, seeds: int, steps: int) -> dict[str, Any]:
    """Search the rate of a method on the validation rows, then test it; return means and largest distances."""
    fields: dict[str, Any] = {"model": model, "task": "classification", "method": method, "max_steps": steps}
    fields["targets"] = "attention"
    fields |= {"sequence_length": LENGTH, "micro_batch_size": ROWS, "gradient_accumulation": 1, "probe_interval": 0}
    fields |= {"evaluation_interval": 0, "evaluation_rows": TESTED, "warmup_fraction": 0.1, "device": "cpu"}
    fields |= {"lora_rank": 1, "lora_alpha": 2} if method == "lora" else {}
    fields |= {"num_trainable": trained} if method in ("sift", "random") else {}
    spec = RunSpec(**fields, dataset=str(folder / "search"))
    data = prepare_data(spec, load_tokenizer(spec))
    tried = {}
    for factor in FACTORS:
        rate = RATES[method] * factor
        tried[rate] = train(spec.model_copy(update={"learning_rate": rate}), data)
    best = max(tried, key=lambda rate: (tried[rate]["accuracy"], -tried[rate]["loss"]))
    spec = spec.model_copy(update={"learning_rate": best, "dataset": str(folder / "final")})
    data = prepare_data(spec, load_tokenizer(spec))
    runs = [train(spec.model_copy(update={"seed": seed}), data) for seed in range(seeds)]
    row: dict[str, Any] = {"method": method, "trained": runs[0]["trained"], "head": runs[0]["head"], "seeds": seeds}
    row |= {"learning_rate": best, "tries": {f"{rate:g}": figures["accuracy"] for rate, figures in tried.items()}}
    for name in ("accuracy", "loss"):
        row[name] = statistics.mean(run[name] for run in runs)
        row[f"{name}_spread"] = max(abs(run[name] - row[name]) for run in runs)
    return row


def main() -> None:
    """Print a line a method, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder or Hub id of an encoder")
    parser.add_argument("--data", required=True, type=Path, help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        write_parts(options.data, Path(name))
        for method in METHODS:
            trained = rows[0]["trained"] if rows else 0
            rows.append(measure(method, trained, options.model, Path(name), options.seeds, options.steps))
            if not options.json:
                print(_line(rows[-1]), flush=True)
    if options.json:
        print(json.dumps(rows))


def _line(row: dict[str, Any]) -> str:
    tries = ", ".join(f"{rate} {accuracy:.2f}" for rate, accuracy in row["tries"].items())
    return (
        f"{row['method']:<8}{row['trained']:>12,} trained + head {row['head']:,}   accuracy {row['accuracy']:.3f} ± "
        f"{row['accuracy_spread']:.3f}   loss {row['loss']:.3f} ± {row['loss_spread']:.3f}   rate "
        f"{row['learning_rate']:g} of {tries}"
    )


if __name__ == "__main__":
    main()

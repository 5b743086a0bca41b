"""Sweeps: what runs are made of a spec, what is said of their rows, and what an interruption leaves."""

import json
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest

from engine.__main__ import main
from engine.analysis import sweeps
from engine.analysis.sweep_findings import density_findings, module_findings, schedule_findings
from engine.analysis.sweeps import Row, density_trials, module_trials, module_weights, schedule_trials, specs_of
from engine.errors import EngineError, InvalidSpecError, RunError, WorkerError
from engine.planner.shape import build_shape, read_shape
from engine.spec import RunSpec

SPEC = RunSpec(model="demo", dataset="demo/pirate", density=0.05, learning_rate=0.001, seed=7)
REPORT = {"num_active": 9, "train_seconds": 1.0, "evaluation_loss": {"base": 2.0, "tuned": 1.5}}


def _row(loss: float, seed: int = 0, trained: int = 100, match: float | None = None, **labels: str) -> Row:
    return Row(labels, seed, 0.001, trained, 3.0, loss, match, 1.0)


def test_lora_takes_the_ranks_whose_values_come_nearest() -> None:
    shape = read_shape("demo")
    trials = density_trials(shape, SPEC, (0.001, 0.01, 0.05), ("sift", "lora"))
    # 2,621,440 entries in 4 blocks; rank 1 has 4 * (4 * 512 + 3 * 768) = 17,408 values.
    assert [trial.labels["budget"] for trial in trials] == ["0.1 %", "1 %", "5 %", "rank 1", "rank 2", "rank 8"]
    assert trials[-1].fields == {"method": "lora", "lora_rank": 8, "lora_alpha": 16}


def test_every_choice_of_weights_has_the_same_number_of_trained_values() -> None:
    trials = module_trials(read_shape("demo"), SPEC, ("v", "qkv", "mlp"), ("sift", "random"))
    assert {trial.fields["num_trainable"] for trial in trials} == {131_072}
    assert trials[0].fields["targets"] == ("model.layers.*.self_attn.v_proj.weight",)
    assert len(trials[2].fields["targets"]) == len(trials[4].fields["targets"]) == 3
    assert len(trials) == 6


def test_choice_with_too_few_entries_is_said() -> None:
    with pytest.raises(EngineError, match=r"v has 262,144 entries and 524,288 are to be trained\. Set a lower density"):
        module_trials(read_shape("demo"), SPEC.model_copy(update={"density": 0.2}), ("v",), ("sift",))


def test_fused_attention_has_no_v_alone() -> None:
    config = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64, "n_positions": 32}
    tensors = build_shape("here", config, None, "F32").tensors
    assert {".".join(name.split(".")[-3:]) for name in module_weights(tensors, "mlp")} == {
        "mlp.c_fc.weight",
        "mlp.c_proj.weight",
    }
    with pytest.raises(EngineError, match=r"no weights that v means\. Leave it out of --modules\."):
        module_weights(tensors, "v")


def test_runs_share_all_but_their_trial_seed_and_rate() -> None:
    trials = [
        *schedule_trials((10,), ("cosine",), ("spiel-ma",)),
        *density_trials(read_shape("demo"), SPEC, (0.1,), ("sift",)),
    ]
    (first, second), (sift, _) = specs_of(SPEC, trials, 2, {"sift": 0.5})
    assert (first.period, first.schedule, first.method) == (10, "cosine", "spiel-ma")
    assert (first.seed, second.seed) == (7, 8)
    assert (first.learning_rate, sift.learning_rate) == (pytest.approx(0.02), 0.5)
    assert first.model_copy(update={"seed": 8}) == second
    with pytest.raises(InvalidSpecError, match="estimation_steps must be at most period"):
        specs_of(SPEC, schedule_trials((2,), ("linear",), ("spiel-ag",)), 1, {})


def test_means_spreads_and_counts_are_told() -> None:
    rows = [_row(1.0, 0, method="sift", budget="1 %"), _row(1.2, 1, method="sift", budget="1 %")]
    rows += [_row(0.5, trained=900, method="sift", budget="9 %"), _row(2.0, method="random", budget="1 %")]
    rows.append(Row({"method": "random", "budget": "9 %"}, 0, 0.001, error="The loss became nan."))
    findings = density_findings(rows)
    assert findings.rows[0] == ("sift", "1 %", "100", "0.001", "1.1000 ± 0.1000", "2")
    assert "the held-out loss is sift 1.1000 ± 0.1000 (100) and random 2.0000 (100)" in findings.sentence
    assert "with the most, sift 0.5000 (900)" in findings.sentence
    assert findings.sentence.endswith("1 of 5 runs failed, the first (random, 9 %) so: The loss became nan.")
    sift = go.Figure(findings.plots[0].figure).data[0]
    assert (list(sift.x), list(sift.y)) == ([100, 900], [pytest.approx(1.1), 0.5])


def test_best_weights_and_wins_over_random_are_told() -> None:
    rows = [
        _row(loss, weights=w, method=m, match=0.5)
        for w, m, loss in (("v", "sift", 1.0), ("v", "random", 1.5), ("mlp", "sift", 2.0), ("mlp", "random", 1.9))
    ]
    findings = module_findings(rows)
    assert "lowest held-out loss is 1.0000, with sift on v" in findings.sentence
    assert "sift is below random on 1 of 2 choices" in findings.sentence
    assert len(findings.plots) == 2


def test_best_and_worst_schedule_are_told() -> None:
    rows = [
        _row(loss, method="spiel-ag", schedule=s, period=p)
        for s, p, loss in (("linear", "10", 1.0), ("linear", "20", 3.0), ("cosine", "10", 1.5))
    ]
    sentence = schedule_findings(rows).sentence
    assert "lowest held-out loss is 1.0000 with spiel-ag, linear, every 10 steps" in sentence
    assert "spiel-ag, linear 2.0000, spiel-ag, cosine 1.5000" in sentence


def _sweep(*more: str) -> int:
    return main(["analyse", "density", "demo", "--densities", "0.01,0.05", "--methods", "sift", "--out", "out", *more])


def test_interruption_keeps_what_is_finished(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def train_once(spec: RunSpec) -> dict[str, Any]:
        if spec.density == 0.05:
            raise KeyboardInterrupt
        return {**REPORT, "exact_match": {"tuned": None}}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweeps, "train_once", train_once)
    assert _sweep() == 130
    assert "1/2  sift, 1 %, seed 0: 9 values, held-out loss 1.5000, 1 s" in capsys.readouterr().err
    body = json.loads(Path("out/analysis.json").read_text())
    assert body["settings"]["runs"] == "1 of 2"
    assert [row["loss"] for row in body["result"]["rows"]] == [1.5]
    assert len(Path("out/rows.jsonl").read_text().splitlines()) == 1


def test_run_that_fails_later_is_a_row_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def train_once(spec: RunSpec) -> dict[str, Any]:
        if spec.density == 0.05:
            raise WorkerError("It did not come up.")
        return {**REPORT, "exact_match": {"tuned": None}}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweeps, "train_once", train_once)
    assert _sweep() == 0
    said = capsys.readouterr()
    assert "2/2  sift, 5 %, seed 0: failed: It did not come up." in said.err
    assert "1 of 2 runs failed, the first (sift, 5 %) so: It did not come up." in said.out


def test_sweep_whose_first_run_fails_ends_with_its_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def train_once(_spec: RunSpec) -> dict[str, Any]:
        raise RunError("The dataset is odd.")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweeps, "train_once", train_once)
    assert _sweep() == 2
    assert capsys.readouterr().err == "Error: The dataset is odd.\n"
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--methods", "ia3"], "must be some of sift, random"),
        (["--densities", "a"], "must be numbers, separated by commas, got 'a'"),
        (["--rate", "lora:1"], "must be METHOD=VALUE, such as lora=0.001, got 'lora:1'"),
    ],
)
def test_options_that_cannot_be_read_are_said(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _sweep(*arguments) == 2
    assert said in capsys.readouterr().err


@pytest.mark.usefixtures("forked")
@pytest.mark.xdist_group("forked")
def test_real_runs_are_compared(
    model_folder: Path, dataset_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fields = {
        "model": model_folder,
        "dataset": dataset_folder,
        "max_steps": 2,
        "gradient_accumulation": 1,
        "sequence_length": 48,
        "num_trainable": 400,
        "evaluation_rows": 4,
    }
    sets = [part for name, value in fields.items() for part in ("--set", f"{name}={value}")]
    assert main(["analyse", "modules", *sets, "--modules", "v,mlp", "--methods", "random", "--out", "out"]) == 0
    rows = json.loads((tmp_path / "out" / "analysis.json").read_text())["result"]["rows"]
    assert [row["labels"]["weights"] for row in rows] == ["v", "mlp"]
    assert all(390 <= row["trained"] <= 400 for row in rows)
    assert rows[0]["base_loss"] == rows[1]["base_loss"] != rows[0]["loss"]

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from engine.errors import InvalidSpecError
from engine.presets import list_presets, load_preset
from engine.spec import RunSpec, about, choices
from engine.spec_io import apply_overrides, dump_spec, load_values, parse_spec


def _problems(**values: object) -> dict[str, str]:
    with pytest.raises(InvalidSpecError) as caught:
        parse_spec(values)
    return {problem.field: problem.message for problem in caught.value.problems}


def test_every_problem_is_reported_at_once_with_value_and_remedy() -> None:
    found = _problems(model="demo", density=5, method="foo", seed=-1, learnin_rate=1, columns={"foo": "a"})
    assert found.keys() == {"density", "method", "seed", "learnin_rate", "columns"}
    assert found["density"] == "density must be in (0, 1], got 5. For 5 percent write 0.05."
    assert found["method"] == f"method must be one of {', '.join(choices('method'))}, got 'foo'."
    assert found["learnin_rate"] == "There is no field 'learnin_rate'. Did you mean learning_rate?"


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("device", "gpu", "device must be auto, cpu, cuda or cuda:N, got 'gpu'."),
        ("targets", 3, "targets must be attention, linear, all or a list of patterns, got 3."),
        ("micro_batch_size", 0, "micro_batch_size must be a whole number in [1, 4096], got 0."),
        ("budget_gib", -1, "budget_gib must be in (0, 1000000], got -1."),
        ("density", None, "density must be in (0, 1], got nothing. For 5 percent write 0.05."),
        ("max_steps", 1.5, "max_steps must be a whole number of at least 1, got 1.5."),
        ("learning_rate", float("nan"), "learning_rate must be in (0, 10], got nan. Try 0.0002."),
    ],
)
def test_each_rule_names_the_value(field: str, value: object, sentence: str) -> None:
    assert _problems(model="demo", **{field: value}) == {field: sentence}


def test_missing_model_is_said() -> None:
    assert _problems()["model"].startswith("model is missing.")


def test_spec_is_frozen() -> None:
    with pytest.raises(ValidationError):
        RunSpec(model="demo").density = 0.5  # type: ignore[misc]


def test_yaml_round_trip_keeps_every_field(tmp_path: Path) -> None:
    spec = parse_spec({"model": "demo", "targets": ["q_proj"], "learning_rate": 3e-4, "columns": {"text": "t"}})
    path = tmp_path / "spec.yaml"
    path.write_text(dump_spec(spec))
    assert parse_spec(load_values(path)) == spec


def test_overrides_read_yaml_and_exponents() -> None:
    overrides = ["density=1e-2", "targets=[q_proj]", "max_steps=null", "budget_gib=22.5"]
    values = apply_overrides({"model": "demo"}, overrides)
    spec = parse_spec(values)
    assert (spec.density, spec.targets, spec.max_steps, spec.budget_gib) == (0.01, ("q_proj",), None, 22.5)


def test_override_without_a_value_is_one_sentence() -> None:
    with pytest.raises(InvalidSpecError, match=r"--set takes name=value, got 'density'"):
        apply_overrides({}, ["density"])


def test_unreadable_spec_file_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("model: [demo")
    with pytest.raises(InvalidSpecError, match="is not valid YAML in line"):
        load_values(path)


def test_every_field_has_words_for_a_person() -> None:
    for name in RunSpec.model_fields:
        assert about(name).label
        assert about(name).help.endswith((".", ")"))


@pytest.mark.parametrize("name", list_presets())
def test_preset_loads(name: str) -> None:
    assert load_preset(name).model


def test_scalars_mean_what_their_field_means() -> None:
    values = apply_overrides({}, ["model=2024", "dataset=2024-13-45", "density=true"])
    assert _problems(**values) == {"density": "density must be in (0, 1], got 'true'. For 5 percent write 0.05."}
    spec = parse_spec({**values, "density": 0.1})
    assert (spec.model, spec.dataset) == ("2024", "2024-13-45")


def test_spec_file_that_is_no_text_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(b"model: \xff\xfe")
    with pytest.raises(InvalidSpecError, match="is no text in UTF-8"):
        load_values(path)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"method": "spiel-ma", "optimizer_states": "8bit"},
            "float32 of sm3, which keeps one number a row and a column",
        ),
        ({"optimizer": "sgd", "offload_states": True}, "offload_states must be false of sgd, which keeps no states"),
        (
            {"optimizer": "radam", "optimizer_states": "8bit"},
            "float32 of radam, which is torch as it stands, got '8bit'",
        ),
        ({"optimizer_states": "compact"}, "dtype must be bfloat16 for optimizer_states=compact, .*, got 'auto'"),
        (
            {"optimizer_states": "compact", "dtype": "float16"},
            "the base holds half of each value, got 'float16'. Use dtype=bfloat16, quantization=nf4, or .*8bit",
        ),
        (
            {"optimizer_states": "compact", "dtype": "bfloat16", "method": "lora"},
            "must be float32 or 8bit for lora, which trains no sparse entries, got 'compact'",
        ),
        ({"optimizer_states": "compact", "optimizer": "adam"}, "float32 of adam, which is torch as it stands"),
        ({"optimizer": "rprop", "weight_decay": 0.1}, "weight_decay must be 0 for rprop, .*, got 0.1"),
        ({"optimizer": "lbfgs"}, r"adamw, sm3, .*, got 'lbfgs'. Not those that need matrices \(muon\), a closure"),
        ({"method": "spiel-ag", "optimizer": "adam"}, "optimizer must be adamw for spiel-ag"),
        ({"method": "lora", "optimizer": "sm3"}, "optimizer must be any but sm3 for lora"),
    ],
)
def test_optimizers_and_their_states_that_do_not_go_together_are_said(fields: dict[str, object], sentence: str) -> None:
    with pytest.raises(InvalidSpecError, match=sentence):
        parse_spec({"model": "demo", **fields})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"task": "classification", "dataset_format": "messages"}, "must be one of auto, classification for task="),
        ({"dataset_format": "classification"}, "for task=causal, got 'classification'"),
        ({"columns": {"label": "a"}}, "columns must name roles of task=causal, got 'label'"),
        ({"task": "classification", "columns": {"output": "a"}}, "got 'output'. Use label, text, text_pair, or"),
    ],
)
def test_rows_must_fit_the_task(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidSpecError, match=re.escape(words)):
        parse_spec({"model": "demo", **fields})


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"device": "cuda:1"}, "device must be auto, cuda or cpu with num_processes=2, .*, got 'cuda:1'"),
        ({"selection_micro_steps": 3}, "multiple of num_processes, .*, got 3 and 2. Use selection_micro_steps=4"),
    ],
)
def test_what_several_processes_cannot_do_is_said(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidSpecError, match=sentence):
        parse_spec({"model": "demo", "num_processes": 2, **fields})


@pytest.mark.parametrize("name", RunSpec.model_fields)
def test_help_speaks_of_other_fields_in_words_that_the_form_has_too(name: str) -> None:
    written = {field for field in RunSpec.model_fields if "_" in field} | {
        f"{field}=" for field in RunSpec.model_fields
    }
    assert not [word for word in written if word in about(name).help]

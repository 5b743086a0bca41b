"""What leaves a run: merged models and PEFT adapters, loaded by stock transformers and peft and compared with us."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, SupertuningConfig, get_peft_model
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from engine.__main__ import main
from engine.errors import DeltaError, EngineError
from engine.events import EventWriter, ModelLoaded
from engine.export import export_peft, merge
from engine.models import load_model
from engine.peft_format import import_peft
from engine.runs import Run, create_run, read_spec, write_json
from engine.sparse.attach import attach
from engine.sparse.delta import SparseDelta
from engine.spec import RunSpec

Make = Callable[..., Run]
REPORT = {"steps": 7, "evaluation_loss": {"base": 5.5, "tuned": 4.25}, "exact_match": {"base": 0.0, "tuned": None}}


@pytest.fixture
def make(model_folder: Path, dataset_folder: Path, tmp_path: Path) -> Make:
    """Make a run with a delta of random values and a report."""

    def create(**fields: Any) -> Run:
        names = {"model": str(model_folder), "dataset": str(dataset_folder), "output": str(tmp_path / "runs")}
        values = {"method": "random", "density": 0.05, "dtype": "float32", "device": "cpu"}
        run = create_run(RunSpec(**{**names, **values, **fields}))
        tuning = attach(load_model(read_spec(run), torch.device("cpu")), read_spec(run))
        with torch.no_grad():
            for entry in tuning.entries:
                entry.values.normal_(std=0.05)
        tuning.delta().save(run.delta_path)
        write_json(run.path / "report.json", REPORT)
        return run

    return create


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    ids = torch.randint(0, 128, (2, 16), generator=torch.Generator().manual_seed(1))
    return model(input_ids=ids).logits.float()


def _base(run: Run) -> LlamaForCausalLM:
    return load_model(read_spec(run), torch.device("cpu"))


def _ours(run: Run) -> Tensor:
    model = _base(run)
    SparseDelta.load(run.delta_path).apply(model)
    return _logits(model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_merged_model_is_ours_bit_for_bit_in_its_dtype(make: Make, tmp_path: Path, dtype: str) -> None:
    run = make(dtype=dtype, targets="all")
    done = merge(run, tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(done.folder)
    assert loaded.dtype == getattr(torch, dtype)
    assert torch.equal(_logits(loaded), _ours(run))
    assert AutoTokenizer.from_pretrained(done.folder).decode([40, 41]) == AutoTokenizer.from_pretrained(
        read_spec(run).model
    ).decode([40, 41])
    assert done.num_bytes == sum(path.stat().st_size for path in done.folder.rglob("*"))
    assert not {path.suffix for path in done.folder.iterdir()} & {".bin", ".pt", ".pkl"}


def test_automatic_dtype_is_the_one_that_the_run_computed_in(make: Make, tmp_path: Path) -> None:
    run = make(dtype="auto")
    EventWriter(run.events_path).write(ModelLoaded(1, 1, 1, 1, "cuda:0", "bfloat16", 0.1))
    assert merge(run, tmp_path / "merged").dtype == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16


def test_tied_weights_stay_tied_and_carry_the_delta(
    make: Make, tiny_llama: LlamaForCausalLM, model_folder: Path, tmp_path: Path
) -> None:
    config = LlamaConfig(**{**tiny_llama.config.to_dict(), "tie_word_embeddings": True})
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tied")
    for path in model_folder.glob("token*"):
        shutil.copy(path, tmp_path / "tied")
    run = make(model=str(tmp_path / "tied"), targets=("embed_tokens",))
    loaded = AutoModelForCausalLM.from_pretrained(merge(run, tmp_path / "merged").folder)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(_logits(loaded), _ours(run))


@pytest.mark.parametrize("targets", ["linear", ("embed_tokens",)])  # in NF4, and left dense beside it
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_nf4_run_computes_what_the_run_computes(make: Make, tmp_path: Path, dtype: str, targets: Any) -> None:
    run = make(quantization="nf4", dtype=dtype, targets=targets)
    done = merge(run, tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(done.folder)
    assert loaded.dtype == getattr(torch, dtype)
    torch.testing.assert_close(_logits(loaded), _ours(run), atol=1e-5 if dtype == "float32" else 0, rtol=0)


def test_layers_of_gpt2_are_merged_in_their_own_layout(make: Make, model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "gpt2", ignore=shutil.ignore_patterns("*model*", "config.json"))
    GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=300)).save_pretrained(tmp_path / "gpt2")
    run = make(model=str(tmp_path / "gpt2"), quantization="nf4", dtype="float32")
    done = merge(run, tmp_path / "merged")
    torch.testing.assert_close(
        _logits(AutoModelForCausalLM.from_pretrained(done.folder)), _ours(run), atol=1e-5, rtol=0
    )
    assert 0 < done.figures["requantised_error_max"] < 0.2


def test_error_of_quantising_again_is_what_nf4_loses(make: Make, tmp_path: Path) -> None:
    run = make(quantization="nf4")
    figures = merge(run, tmp_path / "merged").figures
    again = load_model(read_spec(run).model_copy(update={"model": str(tmp_path / "merged")}), torch.device("cpu"))
    assert 0 < figures["requantised_error_rms"] < figures["requantised_error_max"] < 0.2
    assert 0 < figures["requantised_error_rms"] < figures["delta_rms"] == pytest.approx(0.05 * 0.05**0.5, rel=0.1)
    assert (_logits(again) - _ours(run)).abs().max() > 0


def test_peft_loads_the_adapter_to_the_same_logits(make: Make, tmp_path: Path) -> None:
    run = make()
    done = export_peft(run, tmp_path / "adapter")
    model = PeftModel.from_pretrained(_base(run), done.folder)
    assert (_logits(model) - _logits(_base(run))).abs().max() > 1e-2
    torch.testing.assert_close(_logits(model), _ours(run), atol=1e-5, rtol=0)
    torch.testing.assert_close(_logits(model.merge_and_unload()), _ours(run), atol=1e-5, rtol=0)
    assert done.figures == {"share_rounded_otherwise": 0}


def test_peft_in_bf16_differs_by_one_rounding_and_says_how_often(make: Make, tmp_path: Path) -> None:
    run = make(dtype="bfloat16")
    done = export_peft(run, tmp_path / "adapter")
    truth = make(dtype="float32")
    error = [(logits - _ours(truth)).abs().mean() for logits in (_ours(run), _logits(_peft(run, done.folder)))]
    assert 0 < done.figures["share_rounded_otherwise"] < 0.5
    assert error[1] <= 1.5 * error[0]


def _peft(run: Run, folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(_base(run), folder)


@pytest.mark.parametrize("fields", [{"density": 0.013}, {"num_trainable": 12345}, {"density": 1.0}, {"density": 1e-5}])
def test_lengths_that_peft_derives_fit_every_density(make: Make, tmp_path: Path, fields: dict[str, Any]) -> None:
    run = make(**fields)
    folder = export_peft(run, tmp_path / "adapter").folder
    torch.testing.assert_close(_logits(_peft(run, folder)), _ours(run), atol=1e-5, rtol=0)


def _thinned(run: Run) -> SparseDelta:
    """Keep fewer entries of every second weight and save that."""
    delta = SparseDelta.load(run.delta_path)
    tensors = {
        name: (at[:: 1 + place % 3].clone(), values[:: 1 + place % 3].clone())
        for place, (name, (at, values)) in enumerate(delta.tensors.items())
    }
    thinned = replace(delta, tensors=tensors)
    thinned.save(run.delta_path)
    return thinned


def test_uneven_delta_is_padded_without_effect_and_comes_back_whole(make: Make, tmp_path: Path) -> None:
    run = make()
    delta = _thinned(run)
    folder = export_peft(run, tmp_path / "adapter").folder
    torch.testing.assert_close(_logits(_peft(run, folder)), _ours(run), atol=1e-5, rtol=0)
    back = import_peft(folder, _base(run))
    assert back.info == delta.info
    assert back.tensors.keys() == delta.tensors.keys()
    for name, entries in delta.tensors.items():
        assert all(torch.equal(one, other) for one, other in zip(back.tensors[name], entries, strict=True))


def test_adapter_of_int32_and_fp32_carries_no_pickle(make: Make, tmp_path: Path) -> None:
    folder = export_peft(make(dtype="bfloat16"), tmp_path / "adapter").folder
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        dtypes = {(key.rpartition("_")[2], file.get_tensor(key).dtype) for key in file.keys()}  # noqa: SIM118
    assert dtypes == {("indices", torch.int32), ("values", torch.float32)}
    assert {path.name for path in folder.iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json", "delta.json", "README.md"
    }  # fmt: skip


def test_adapter_that_peft_itself_saved_is_a_delta(make: Make, tmp_path: Path) -> None:
    run = make()
    config = SupertuningConfig(target_modules=["q_proj", "up_proj"], sparsity=0.9, init_weights=False)
    model = get_peft_model(_base(run), config)
    model.save_pretrained(tmp_path / "theirs")
    base = _base(run)
    delta = import_peft(tmp_path / "theirs", base)
    assert delta.info.density == pytest.approx(0.1, rel=0.01)
    delta.apply(base)
    torch.testing.assert_close(_logits(base), _logits(model), atol=1e-5, rtol=0)


def test_import_refuses_other_adapters_and_another_base(make: Make, tmp_path: Path) -> None:
    run = make()
    folder = export_peft(run, tmp_path / "adapter").folder
    base = _base(run)
    with torch.no_grad():
        base.model.layers[0].mlp.up_proj.weight.add_(0.1)
    with pytest.raises(DeltaError, match="not those the delta was trained on"):
        import_peft(folder, base)
    body = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**body, "peft_type": "LORA"}))
    with pytest.raises(DeltaError, match="type SUPERTUNING without a low-rank part are deltas, got LORA"):
        import_peft(folder, base)
    with pytest.raises(DeltaError, match="holds no PEFT adapter"):
        import_peft(tmp_path, base)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"quantization": "nf4"}, "has quantization=nf4"),
        ({"targets": "all"}, r"'model.embed_tokens.weight' of a Embedding"),
        ({"targets": ("norm",)}, "of a LlamaRMSNorm"),
    ],
)
def test_peft_has_no_place_and_the_merge_is_offered(
    make: Make, tmp_path: Path, fields: dict[str, Any], match: str
) -> None:
    with pytest.raises(DeltaError, match=match + r".*Export it merged instead \(--as merged\)\.") as raised:
        export_peft(make(**fields), tmp_path / "adapter")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("method", ["random", "lora"])
def test_peft_names_no_layer_of_a_model_that_also_sees(
    make: Make, tmp_path: Path, seeing: tuple[Path, Any], method: str
) -> None:
    run = make(model=str(seeing[0]))
    body = json.loads((run.delta_path / "delta.json").read_text())
    write_json(run.delta_path / "delta.json", {**body, "method": method})
    with pytest.raises(DeltaError, match=r"seeing' also sees.*Export it merged instead"):
        export_peft(run, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("export", [merge, export_peft])
def test_card_names_base_method_density_dataset_and_figures(
    make: Make, tmp_path: Path, export: Callable[..., Any]
) -> None:
    run = make()
    card = (export(run, tmp_path / "out").folder / "README.md").read_text()
    for row in (
        "Base model | tiny",
        "Method | random",
        "Density | 4.99 % ",
        "Held-out loss per token | base 5.500, tuned 4.250",
    ):
        assert f"| {row}" in card
    assert "| Held-out exact match | base 0.000, tuned not measured |" in card
    assert f"| Dataset | {Path(read_spec(run).dataset).name} |" in card
    assert str(tmp_path) not in card


def test_run_without_a_result_and_another_base_are_sentences(make: Make, tmp_path: Path) -> None:
    run = make()
    other = make(targets="attention")
    shutil.copy(other.delta_path / "delta.json", run.delta_path)
    for export in (merge, export_peft):
        with pytest.raises(DeltaError, match="not those the delta was trained on"):
            export(run, tmp_path / "out")
    shutil.rmtree(run.delta_path)
    with pytest.raises(DeltaError, match="A run that finished or was stopped has one"):
        merge(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folder_in_use_is_a_sentence_and_stays_as_it_was(make: Make, tmp_path: Path) -> None:
    folder = tmp_path / "full"
    folder.mkdir()
    (folder / "letter.txt").write_text("mine")
    for export in (merge, export_peft):
        with pytest.raises(EngineError, match=r"new or an empty folder, and '.*full' is neither"):
            export(make(), folder)
    assert [path.name for path in folder.iterdir()] == ["letter.txt"]
    with pytest.raises(EngineError, match=r"inside' cannot be written: Not a directory\. Name another"):
        merge(make(), folder / "letter.txt" / "inside")


@pytest.mark.parametrize("kind", ["merged", "peft"])
def test_command_prints_one_line_of_what_it_wrote(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    run = make()
    (tmp_path / "out").mkdir()
    assert main(["export", str(run.path), str(tmp_path / "out"), "--as", kind]) == 0
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert said.startswith(f"{kind} (float32): ")
    assert f"KiB in {tmp_path / 'out'}" in said
    assert main(["export", str(run.path), str(tmp_path / "out"), "--as", kind]) == 2
    assert "is neither. Name another." in capsys.readouterr().err

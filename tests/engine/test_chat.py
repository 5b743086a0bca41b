"""The chat worker's model: that of the run, also where the run's GPU is not there for it."""

from pathlib import Path

import torch

from engine.chat import ChatModel
from engine.events import EventWriter, ModelLoaded
from engine.models import load_model
from engine.runs import create_run
from engine.sparse.attach import attach
from engine.spec import RunSpec


def test_chat_on_the_cpu_finds_the_nf4_base_that_a_gpu_quantised_in_bf16(
    model_folder: Path, dataset_folder: Path, tmp_path: Path
) -> None:
    spec = RunSpec(
        model=str(model_folder),
        dataset=str(dataset_folder),
        output=str(tmp_path / "runs"),
        method="random",
        density=0.05,
        quantization="nf4",
        device="cpu",
    )
    run = create_run(spec)
    computed = spec.model_copy(update={"dtype": "bfloat16"})  # what `auto` is on a GPU
    attach(load_model(computed, torch.device("cpu")), computed).delta().save(run.delta_path)
    EventWriter(run.events_path).write(ModelLoaded(1, 1, 1, 1, "cuda:0", "bfloat16", 0.1))
    said = []
    asked = [{"role": "user", "content": "hello"}]
    ChatModel(run).answer("tuned", asked, lambda text, done: said.append(done), max_new_tokens=2, temperature=0.0)
    assert said[-1]

"""The code for a GPU runs where none is: on a stand-in for one, with the results of the CPU.

The stand-in's numbers are computed on the CPU by the same operations, so the results are the same; what would fail is a
tensor that lies in main memory where one of the GPU is needed.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.utils import cpp_extension

FOLDER = Path(__file__).with_name("gpu_stand_in")
CASES: list[dict[str, Any]] = [
    *({"method": name} for name in ("random", "sift", "fisher", "magnitude")),
    *({"method": "sift", "gradient_way": way} for way in ("dense", "compaction", "sampled")),
    *({"method": "sift", "reselection_period": 2, "optimizer_states": kind} for kind in ("float32", "8bit")),
    {"method": "sift", "optimizer_states": "compact", "dtype": "bfloat16"},
    {"method": "sift", "reselection_period": 2, "optimizer_states": "8bit", "offload_states": True},
    {"method": "sift", "recompute": "mlp", "recompute_blocks": 1, "structure": "columns"},
    {"method": "sift", "recompute": "blocks", "recompute_blocks": 1, "offload_activations": True},
    {"method": "sift", "targets": "all", "dtype": "bfloat16", "allocation": "global"},
    *({"method": "spiel-ag", "period": 2, "estimation_steps": 1, "allocation": kind} for kind in ("uniform", "global")),
    {"method": "spiel-ag", "period": 2, "estimation_steps": 1, "offload_states": True},
    {"method": "spiel-ma", "period": 2},
    {"method": "lora", "gradient_checkpointing": True},
    {"method": "full", "chunked_loss": True},
]
pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler"),
    pytest.mark.xdist_group("gpu stand-in"),  # compiled once
]


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    guard = tmp_path_factory.mktemp("guard") / "guard.so"
    include = [f"-I{path}" for path in cpp_extension.include_paths()]
    library = cpp_extension.library_paths()[0]
    linked = [f"-L{library}", f"-Wl,-rpath,{library}", "-ltorch", "-ltorch_cpu", "-lc10"]
    build = ["g++", "-O0", "-shared", "-fPIC", "-std=c++20", FOLDER / "guard.cpp", *include, "-o", guard, *linked]
    subprocess.run(build, check=True)
    return guard


@pytest.fixture(scope="module")
def results(guard: Path) -> list[list[float]]:
    command = [sys.executable, "-W", "ignore", FOLDER / "steps.py", guard, json.dumps(CASES)]
    nothing_compiled = os.environ | {"TORCH_COMPILE_DISABLE": "1"}  # for a device that is not there
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=nothing_compiled)
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", range(len(CASES)), ids=[" ".join(map(str, case.values())) for case in CASES])
def test_a_run_on_a_gpu_has_all_its_tensors_there(results: list[list[float]], case: int) -> None:
    here, there = (learnt[case] for learnt in results)
    assert there == pytest.approx(here, rel=0.02)  # 8-bit states and sums go other ways on a GPU
    assert here > 0


def test_weights_go_to_a_gpu_one_by_one_not_as_a_whole_model_from_main_memory(guard: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", FOLDER / "loading.py", guard, tmp_path]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    loaded, placed = (json.loads(line) for line in said.splitlines())
    assert loaded == placed == ["cuda:0"]


def test_the_stand_in_refuses_to_mix(guard: Path) -> None:
    mix = f"import device; device.load({str(guard)!r}); import torch\nwith device.stand_in():\n    "
    mix += "torch.ones(2, device='cuda') + torch.ones(2)"
    found = subprocess.run([sys.executable, "-c", mix], cwd=FOLDER, stderr=subprocess.PIPE, text=True, check=False)
    assert "over tensors of cuda:0 and cpu" in found.stderr

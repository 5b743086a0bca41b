"""What a checkpoint holds beside the tensors of a run; that a run goes on from it is seen in `test_resume.py`."""

import pytest
import torch

from engine.sparse.peers import ALONE
from engine.train.checkpoint import gather_rng


def test_a_run_on_the_cpu_asks_no_gpu_for_its_random_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """A computer with a GPU that this process has not begun to use: to ask for its state would begin."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gather_rng(ALONE) == {}
    assert not torch.cuda.is_initialized()

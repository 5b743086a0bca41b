"""One process alone exchanges nothing, and one that torchrun did not start says so; for two see train/test_parallel."""

import pytest
import torch
from torch import distributed

from engine.errors import WorkerError
from engine.sparse.peers import ALONE, PeerLostError, Peers, _together


def test_alone_nothing_changes() -> None:
    tensor = torch.arange(3.0)
    ALONE.add(tensor)
    ALONE.add_all([tensor])
    assert torch.equal(tensor, torch.arange(3.0))
    assert ALONE.totals([1, 2.5]) == [1, 2.5]
    assert ALONE.from_first("me") == "me"
    assert ALONE.gather(tensor)[0] is tensor
    with ALONE.one_after_the_first():
        assert Peers.join(1, on_cpu=True) is ALONE
    assert (ALONE.is_first, ALONE.last_word()) == (True, "")


def test_memory_that_ran_out_in_an_exchange_is_no_lost_process() -> None:
    nccl = "NCCL error in: ProcessGroupNCCL.cpp:94, unhandled cuda error. Last error: Cuda failure 2 'out of memory'"
    for said, kind in ((nccl, distributed.DistBackendError), ("Connection closed by peer", PeerLostError)):
        with pytest.raises(kind), _together():
            raise distributed.DistBackendError(said)


def test_several_that_torchrun_did_not_start_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(WorkerError, match="num_processes=2 is started by torchrun with as many, got none"):
        Peers.join(2, on_cpu=True)

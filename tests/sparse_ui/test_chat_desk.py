"""The one chat process of the app: it holds the memory of a card until a run needs it."""

from pathlib import Path

import pytest

from engine.hardware import Gpu
from engine.runs import create_run
from engine.spec import RunSpec
from engine.units import GIB
from sparse_ui.chat_desk import ChatDesk


def test_chat_makes_room_for_a_run_on_a_gpu_and_stays_beside_one_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.hardware.list_gpus", lambda: [Gpu(0, "RTX 4090", 24 * GIB, 23 * GIB, None, 89)])
    run = create_run(RunSpec(model="demo", dataset="demo/pirate", output=str(tmp_path)))
    run.delta_path.mkdir()
    (run.delta_path / "delta.json").write_text("{}", encoding="utf-8")
    desk = ChatDesk()
    asked = [{"role": "user", "content": "hello"}]
    with pytest.raises(Exception, match="delta"):
        [*desk.stream(run, {"tuned": asked}, 4, 0.0)]
    assert desk._holds(run)
    desk.make_room("cpu")
    assert desk._holds(run)
    desk.make_room("auto")
    assert not desk._holds(run)

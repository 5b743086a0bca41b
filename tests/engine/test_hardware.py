"""Which cards a run may use. The driver's answers are stood in for: there may be no card here."""

import pytest

from engine.hardware import _visible

UUIDS = ["GPU-aaaa1111", "GPU-bbbb2222", "GPU-cccc3333"]


@pytest.mark.parametrize(
    ("names", "visible"),
    [
        (None, UUIDS),
        ("", []),
        ("-1", []),
        ("1", UUIDS[1:2]),
        ("2,0", [UUIDS[2], UUIDS[0]]),
        ("0,7,1", UUIDS[:1]),
        ("GPU-bbbb", UUIDS[1:2]),
        ("GPU-cccc3333, 0", [UUIDS[2], UUIDS[0]]),
    ],
)
def test_cards_are_those_that_cuda_shows(
    names: str | None, visible: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pynvml.nvmlDeviceGetUUID", lambda handle: handle)
    if names is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", names)
    assert _visible(UUIDS) == visible

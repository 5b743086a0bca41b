"""The Hugging Face Hub is asked once, for at most three seconds; if it does not answer, the session goes offline.

Without this the libraries retry for about 25 seconds at every name that is not in their cache.
"""

import os
import threading

import httpx

from engine.errors import HubUnreachableError

TIMEOUT_S = 3.0
_VERDICT = "SPARSE_TUNING_HUB"  # in the environment, so that worker processes do not ask again


def hub_online() -> bool:
    """Return whether the Hub can be reached; asks at most once per session, for at most `TIMEOUT_S` seconds.

    Where it cannot, HF_HUB_OFFLINE and its siblings are set for this process and those it starts.
    """
    verdict = os.environ.get(_VERDICT)
    if verdict is None:
        verdict = "offline" if _told_offline() or not _reachable() else "online"
        os.environ[_VERDICT] = verdict
    if verdict == "offline":
        os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    return verdict == "online"


def require_hub(what: str) -> None:
    """Do nothing where the Hub answers.

    Args:
        what: the thing asked for, as the sentence names it: `model 'a/b'`.

    Raises:
        HubUnreachableError: it does not.
    """
    if not hub_online():
        raise HubUnreachableError(
            f"The Hugging Face Hub did not answer within {TIMEOUT_S:g} s, and {what} is not on this computer. "
            "Check the network and restart, or give a local folder."
        )


def _told_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def _reachable() -> bool:
    answers: list[bool] = []
    # In a thread: looking a name up has no time limit of its own.
    asker = threading.Thread(target=lambda: answers.append(_ask()), daemon=True)
    asker.start()
    asker.join(TIMEOUT_S)
    return bool(answers and answers[0])


def _ask() -> bool:
    try:
        httpx.head(os.environ.get("HF_ENDPOINT") or "https://huggingface.co", timeout=TIMEOUT_S)
    except (httpx.HTTPError, httpx.InvalidURL, OSError):
        return False
    return True

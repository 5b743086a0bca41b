"""A model on the Hub as the planner sees it: config.json and tensor headers, from the cache or by range requests."""

from pathlib import Path

from engine.errors import HubUnreachableError, ModelError
from engine.hub import hub_online, require_hub
from engine.planner.headers import INDEX_NAME, SINGLE_NAME, Shape, commonest_dtype, in_order, read_headers, shard_names
from engine.presets import known_config


def config_path(model: str, revision: str | None) -> Path:
    """Return the local path of the model's config.json, downloaded if it is not in the cache.

    Without the Hub the models of the presets are planned from the sizes that come with the project.

    Raises:
        ModelError: the Hub has no such model, or does not show it to you.
        HubUnreachableError: it is not in the cache and the Hub does not answer.
    """
    cached = _cached(model, "config.json", revision)
    if cached is not None:
        return cached
    known = known_config(model)
    if known is not None and not hub_online():
        return known
    require_hub(f"model {model!r}")
    # Imported where needed: it costs a quarter of a second.
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(model, "config.json", revision=revision))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ModelError(_sentence(model, revision, error)) from None


def read_tensors(model: str, revision: str | None) -> tuple[dict[str, Shape] | None, str]:
    """Return the model's tensors, name to shape, and their dtype; None where only config.json is to be had.

    Raises:
        ModelError: the Hub does not show the weights to you.
    """
    files = _cached_weights(model, revision)
    if files:
        return read_headers(files)
    try:
        require_hub(f"model {model!r}")
    except HubUnreachableError:
        return None, ""
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError, SafetensorsParsingError

    try:
        metadata = get_safetensors_metadata(model, revision=revision)
    except NotASafetensorsRepoError:
        return None, ""
    except (HfHubHTTPError, SafetensorsParsingError, OSError) as error:
        raise ModelError(_sentence(model, revision, error)) from None
    entries = {name: info for file in metadata.files_metadata.values() for name, info in file.tensors.items()}
    shapes = {name: tuple(info.shape) for name, info in entries.items()}
    return in_order(shapes), commonest_dtype((info.dtype, tuple(info.shape)) for info in entries.values())


def _cached(model: str, file: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, file, revision=revision)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def require_tensors(model: str, revision: str | None) -> None:
    """Do nothing where the model's weights are in the cache or the Hub answers.

    Raises:
        HubUnreachableError: neither.
    """
    if not _cached_weights(model, revision):
        require_hub(f"model {model!r}")


def _cached_weights(model: str, revision: str | None) -> list[Path]:
    single = _cached(model, SINGLE_NAME, revision)
    if single is not None:
        return [single]
    index = _cached(model, INDEX_NAME, revision)
    if index is None:
        return []
    shards = [_cached(model, name, revision) for name in shard_names(index)]
    found = [shard for shard in shards if shard is not None]
    return found if len(found) == len(shards) else []


def _sentence(model: str, revision: str | None, error: Exception) -> str:
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return f"Model {model!r} asks for an agreement. Accept it on its page, then log in with `hf auth login`."
    if isinstance(error, RevisionNotFoundError):
        return f"Model {model!r} has no revision {revision!r}. Clear model_revision for the default branch."
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"There is no model {model!r} on the Hub, or you may not see it. "
            "Check the spelling, or log in with `hf auth login`."
        )
    if isinstance(error, EntryNotFoundError):
        return f"Model {model!r} has no config.json on the Hub. Give a model in the Hugging Face layout."
    return (
        f"Model {model!r} could not be read from the Hub ({type(error).__name__}). Try again, or give a local folder."
    )

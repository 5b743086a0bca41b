"""Names, shapes and dtypes of a model's tensors, read from the headers of its safetensors files and nothing more."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from engine.errors import ModelError

Shape = tuple[int, ...]
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_LENGTH_BYTES = 8  # little-endian length of the header, then the header as JSON
_MOST_HEADER_BYTES = 100_000_000  # the format's own limit


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder; empty where it has none.

    Raises:
        ModelError: the index names a file that is not there, or is unreadable.
    """
    if (folder / SINGLE_NAME).is_file():
        return [folder / SINGLE_NAME]
    if not (folder / INDEX_NAME).is_file():
        return sorted(folder.glob("*.safetensors"))
    files = [folder / name for name in shard_names(folder / INDEX_NAME)]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise ModelError(
            f"Model folder {str(folder)!r} lacks {missing[0]!r}, one of the {len(files)} weight files its index names. "
            "Download the model again."
        )
    return files


def shard_names(index: Path) -> list[str]:
    """Return the weight files that an index names, sorted.

    Raises:
        ModelError: the index is unreadable.
    """
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{str(index)!r} is not an index of weight files. Download the model again.") from None


def read_headers(files: Iterable[Path]) -> tuple[dict[str, Shape], str]:
    """Return the tensors of safetensors files, name to shape in order of name parts, and the commonest dtype.

    Raises:
        ModelError: a file is torn, or no safetensors file.
    """
    entries: dict[str, Mapping[str, Any]] = {}
    for path in files:
        entries.update(_read_header(path))
    return in_order({name: tuple(entry["shape"]) for name, entry in entries.items()}), commonest_dtype(
        (entry["dtype"], tuple(entry["shape"])) for entry in entries.values()
    )


def _read_header(path: Path) -> dict[str, Mapping[str, Any]]:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if length > _MOST_HEADER_BYTES:
                raise ValueError(length)
            body = json.loads(file.read(length))
        body.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in body.values()), default=0)
        if path.stat().st_size < _LENGTH_BYTES + length + end:
            raise ValueError(end)
        return {name: entry for name, entry in body.items() if entry["shape"] is not None and entry["dtype"]}
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        raise ModelError(f"{str(path)!r} is not a whole safetensors file. Download the model again.") from None


def in_order(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Return `shapes` with block 2 before block 10."""

    def key(name: str) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]

    return {name: shapes[name] for name in sorted(shapes, key=key)}


def commonest_dtype(tensors: Iterable[tuple[str, Shape]]) -> str:
    """Return the dtype that most entries are stored in, as safetensors spells it: BF16, F16, F32."""
    entries: dict[str, int] = {}
    for dtype, shape in tensors:
        numel = 1
        for size in shape:
            numel *= size
        entries[dtype] = entries.get(dtype, 0) + numel
    return max(entries, key=lambda dtype: entries[dtype], default="")

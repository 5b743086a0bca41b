"""Local data files: which belong to which part of a dataset, how they are read, and what is wrong with a broken one."""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from engine.errors import DatasetError

if TYPE_CHECKING:
    import datasets

SUFFIXES = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}
PART_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
# What a dataset's folder says about itself is no data.
ABOUT_NAMES = ("readme.txt", "license.txt", "dataset_info.json", "dataset_infos.json", "state.json")
ROWS_FIELDS = ("data", "rows", "examples")
HEAD_BYTES = 1 << 20


def suffix_of(path: Path) -> str:
    """Return the suffix that says the format: `.jsonl` for `a.jsonl` and for `a.jsonl.gz`."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def is_data_file(path: Path) -> bool:
    """Return whether the name of a file says that it holds rows."""
    return suffix_of(path) in SUFFIXES and not path.name.startswith(".")


def find_parts(folder: Path) -> dict[str, list[Path]]:
    """Return the data files of a folder by part: `train`, `validation`, `test`, as far as they are there.

    The part is in the name of the file (train.jsonl, test-00000-of-00002.parquet) or of its folder (test/a.csv).
    Files that name no part are all `train`, where none does.

    Raises:
        DatasetError: the folder holds no data file, or files of several formats.
    """
    files = [path for path in _walk(folder) if is_data_file(path) and path.name.lower() not in ABOUT_NAMES]
    parts: dict[str, list[Path]] = {}
    for path in files:
        named = _part_of(path.relative_to(folder))
        if named:
            parts.setdefault(named, []).append(path)
    parts = parts or ({"train": files} if files else {})
    if not parts:
        raise DatasetError(
            f"Folder {str(folder)!r} holds no data file. Put in train.jsonl, or another of {', '.join(SUFFIXES)}."
        )
    for paths in parts.values():
        formats = sorted({suffix_of(path) for path in paths})
        if len({SUFFIXES[suffix] for suffix in formats}) > 1:
            raise DatasetError(
                f"Folder {str(folder)!r} holds files of several formats ({', '.join(formats)}) for one part. "
                "Name one file."
            )
    return parts


def _walk(folder: Path) -> Iterator[Path]:
    """The files of a folder and of the folders in it, in the order of their names."""
    for path in sorted(folder.iterdir()):
        if path.is_file():
            yield path
        elif path.is_dir() and not path.name.startswith("."):
            yield from (inner for inner in sorted(path.iterdir()) if inner.is_file())


def _part_of(path: Path) -> str | None:
    for text in (path.name.lower().partition(".")[0], *(parent.lower() for parent in path.parts[:-1])):
        for part, names in PART_NAMES.items():
            if re.search(rf"(^|[-_ ])({'|'.join(names)})($|[-_ ])", text):
                return part
    return None


def load_files(parts: dict[str, list[Path]], split: str, name: str) -> "datasets.Dataset":
    """Return one part of a dataset of local files, in the cache of the `datasets` library.

    Args:
        parts: files by part; those of one part have one format.
        split: a part, or a slice of one: `train[:100]`.
        name: of the dataset, for messages.

    Raises:
        DatasetError: a file cannot be read.
    """
    import datasets

    files = parts[split.partition("[")[0]]
    empty = [path for path in files if path.stat().st_size == 0]
    if empty:
        raise DatasetError(f"{str(empty[0])!r} is empty. Give a file with at least one row.")
    kind = SUFFIXES[suffix_of(files[0])]
    readers = {
        "json": datasets.Dataset.from_json,
        "csv": datasets.Dataset.from_csv,
        "parquet": datasets.Dataset.from_parquet,
        "text": datasets.Dataset.from_text,
    }
    data_files = {split.partition("[")[0]: [str(path) for path in files]}
    try:
        # Not load_dataset: it reports each use of a reader to the Hub, even for local files.
        return cast("datasets.Dataset", readers[kind](data_files, split=split, **_options(kind, files[0])))
    except Exception as error:
        raise DatasetError(explain_broken(files, kind, error, split, name)) from None


def _options(kind: str, path: Path) -> dict[str, Any]:
    if kind == "json":
        return {"field": _rows_field(path), "parse_agent_traces": False, "encoding": _encoding(path)}
    if kind == "csv":
        return _csv_options(path)
    return {"encoding": _encoding(path)} if kind == "text" else {}


def open_file(path: Path) -> IO[bytes]:
    """Open a file to read, through gzip where its name ends so."""
    return cast("IO[bytes]", gzip.open(path)) if path.name.lower().endswith(".gz") else path.open("rb")


def _encoding(path: Path) -> str:
    with open_file(path) as file:
        return "utf-8-sig" if file.read(3) == b"\xef\xbb\xbf" else "utf-8"


def _csv_options(path: Path) -> dict[str, Any]:
    """Every cell is text: an answer `None` or `7` stays as it is written."""
    import datasets

    separator = "\t" if suffix_of(path) == ".tsv" else ","
    with open_file(path) as file:
        head = file.read(HEAD_BYTES).decode("utf-8-sig", errors="replace")
    names = next(csv.reader(head.splitlines(keepends=True), delimiter=separator), [])
    columns = {name: datasets.Value("string") for name in names}
    same = len(columns) == len(names)
    return {
        "sep": separator,
        "keep_default_na": False,
        "encoding": _encoding(path),
        "features": datasets.Features(columns) if columns and same else None,
    }


def _rows_field(path: Path) -> str | None:
    """Return the key that holds the rows where a JSON file is one object, `{"data": [...]}`; None else."""
    with open_file(path) as file:
        head = file.read(HEAD_BYTES).decode("utf-8-sig", errors="replace").lstrip()
    if suffix_of(path) != ".json" or not head.startswith("{"):
        return None
    key = re.match(r'\{\s*"([^"]*)"\s*:', head)
    return key[1] if key and key[1] in ROWS_FIELDS and re.match(r"\s*\[\s*\{", head[key.end() :]) else None


def explain_broken(files: Sequence[Path], kind: str, error: BaseException, split: str, name: str) -> str:
    """Return the sentence for a file that could not be read, with the line where that can be found."""
    if isinstance(error, OSError) and error.filename and Path(error.filename) not in files:
        return f"The cache of the datasets library cannot be written: {error.strerror}. Set HF_HOME to another folder."
    if "corresponds to no data" in str(error):
        return f"{str(files[0])!r} has no rows. Give a file with at least one row."
    for path in files:
        where = {"json": _broken_json, "csv": _broken_csv}.get(kind, _broken_text)(path, error)
        if where:
            return f"{str(path)!r} {where}"
    chain = error.__cause__ or error
    words = str(chain).strip().partition("\n")[0][:200] or type(chain).__name__
    if "[" in split:
        return f"dataset_split {split!r} of dataset {name!r} cannot be read: {words}. For example train[:100]."
    return f"{str(files[0])!r} cannot be read as {suffix_of(files[0])[1:]}: {words.rstrip('.')}."


def _broken_text(path: Path, error: BaseException) -> str:
    number = 0
    try:
        with open_file(path) as file:
            for line in file:
                number += 1
                line.decode("utf-8")
    except UnicodeDecodeError:
        return f"is not UTF-8 text: line {number}. Save it as UTF-8."
    except (gzip.BadGzipFile, EOFError, zlib.error):
        return "is not a whole gzip file. Compress it again, or give it unpacked."
    return ""


def _broken_json(path: Path, error: BaseException) -> str:
    if problem := _broken_text(path, error):
        return problem
    with open_file(path) as file:
        text = file.read().decode("utf-8-sig")
    if text.lstrip().startswith("[") or "\n" not in text.strip():
        return _not_json(text, 0)
    try:
        json.loads(text)
    except json.JSONDecodeError:
        problems = (_not_json(line, number) for number, line in enumerate(text.split("\n")) if line.strip())
        return next((problem for problem in problems if problem), "")
    return ""


def _not_json(text: str, lines_before: int) -> str:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        return f"is not valid JSON: {error.msg}, line {error.lineno + lines_before}. Mend the line or leave it out."
    if not isinstance(rows, (dict, list)) or (
        isinstance(rows, list) and not all(isinstance(row, dict) for row in rows)
    ):
        return 'holds no rows. Each row is an object such as {"instruction": "...", "output": "..."}.'
    return ""


def _broken_csv(path: Path, error: BaseException) -> str:
    if problem := _broken_text(path, error):
        return problem
    found = re.search(r"Expected (\d+) fields in line (\d+), saw (\d+)", f"{error} {error.__cause__}")
    if not found:
        return ""
    return f"has {found[3]} cells instead of {found[1]} in line {found[2]}. Put quotes around cells that hold commas."

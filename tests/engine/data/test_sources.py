"""Files, folders and names become rows; what cannot be read is told in one sentence."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from engine.data.sources import iterate_rows, join_lines, load_source, split_rows
from engine.errors import DatasetError, HubUnreachableError
from engine.spec import RunSpec

ROWS = [{"question": f"q{number}", "answer": f"a{number}"} for number in range(4)]


def spec(dataset: str, **fields: Any) -> RunSpec:
    return RunSpec(model="demo", dataset=dataset, **fields)


def answers(rows: Any) -> list[Any]:
    return [row["answer"] for row in iterate_rows(rows)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", ROWS),
        ("a.jsonl", ROWS),
        ("a.json", {"data": ROWS}),
        ("a.json", "\n".join(json.dumps(row) for row in ROWS)),
        ("a.jsonl.gz", gzip.compress("\n".join(json.dumps(row) for row in ROWS).encode(), mtime=0)),
        ("a.jsonl", "\ufeff" + "\n".join(json.dumps(row) for row in ROWS)),
        ("a.csv", "question,answer\n" + "".join(f"q{number},a{number}\n" for number in range(4))),
        ("a.tsv", "question\tanswer\n" + "".join(f"q{number}\ta{number}\n" for number in range(4))),
    ],
)
def test_every_file_format_gives_the_same_rows(write: Any, name: str, content: Any) -> None:
    assert [*iterate_rows(load_source(spec(write(name, content))).training)] == ROWS


def test_parquet_gives_the_same_rows(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
    assert [*iterate_rows(load_source(spec(str(tmp_path / "a.parquet"))).training)] == ROWS


def test_cells_of_a_csv_stay_as_written(write: Any) -> None:
    rows = load_source(spec(write("a.csv", "question,answer\nq,None\nq,7\nq,007\nq,\n"))).training
    assert answers(rows) == ["None", "7", "007", ""]


def test_a_folder_gives_training_and_held_out_parts(write: Any) -> None:
    write("set/train.jsonl", ROWS[:3])
    folder = Path(write("set/test.jsonl", ROWS[3:])).parent
    source = load_source(spec(str(folder)))
    assert (answers(source.training), answers(source.evaluation)) == (["a0", "a1", "a2"], ["a3"])


def test_the_name_of_an_inner_folder_is_the_part(write: Any) -> None:
    write("set/train/x.jsonl", ROWS[:2])
    write("set/val/x.jsonl", ROWS[2:])
    source = load_source(spec(str(Path(write("set/README.txt", "words")).parent)))
    assert (answers(source.training), answers(source.evaluation)) == (["a0", "a1"], ["a2", "a3"])


def test_files_that_name_no_part_are_all_trained_on(write: Any) -> None:
    write("set/one.jsonl", ROWS[:2])
    source = load_source(spec(str(Path(write("set/two.jsonl", ROWS[2:])).parent)))
    assert (answers(source.training), source.evaluation) == (["a0", "a1", "a2", "a3"], None)


def test_a_slice_of_a_part_is_taken(write: Any) -> None:
    assert answers(load_source(spec(write("a.jsonl", ROWS), dataset_split="train[1:3]")).training) == ["a1", "a2"]


def test_the_chosen_part_is_never_held_out(write: Any) -> None:
    write("set/train.jsonl", ROWS[:3])
    folder = Path(write("set/test.jsonl", ROWS[3:])).parent
    assert load_source(spec(str(folder), dataset_split="test")).evaluation is None


def test_lines_are_joined_and_none_is_lost(write: Any) -> None:
    lines = ["one", "", "two", "x" * 40, "three", ""]
    source = load_source(spec(write("a.txt", "\n".join(lines)), sequence_length=8))
    assert [row["text"] for row in iterate_rows(source.training)] == ["one\n\ntwo", "x" * 40, "three"]
    assert source.passages


def test_passages_of_blank_lines_are_left_out() -> None:
    assert join_lines({"text": ["", " ", "a" * 9, ""]}, 4) == {"text": ["a" * 9]}


def test_split_holds_out_a_seeded_share_without_overlap(write: Any) -> None:
    source = load_source(spec(write("a.jsonl", [{"answer": number} for number in range(40)])))
    training, held_out = split_rows(source, spec("a", evaluation_fraction=0.1))
    assert len(held_out) == 4
    assert sorted(answers(training) + answers(held_out)) == list(range(40))
    assert answers(held_out) == answers(split_rows(source, spec("a", evaluation_fraction=0.1))[1])
    assert answers(held_out) != answers(split_rows(source, spec("a", evaluation_fraction=0.1, seed=1))[1])


@pytest.mark.parametrize(("rows", "fraction", "expected"), [(2, 0.01, 1), (1, 0.5, 0), (4, 0.0, 0), (2, 0.99, 1)])
def test_split_keeps_a_row_on_each_side(write: Any, rows: int, fraction: float, expected: int) -> None:
    source = load_source(spec(write("a.jsonl", ROWS[:rows])))
    assert len(split_rows(source, spec("a", evaluation_fraction=fraction))[1]) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"a": "b"}\n{"a": \n{"a": "c"}\n', r"a\.jsonl' is not valid JSON: .*, line 2\. Mend the line"),
        ("a.json", '[{"a": "b"},\n {"a"}]', r"a\.json' is not valid JSON: .*, line 2\. Mend the line"),
        ("a.json", '"words"', r"a\.json' holds no rows\. Each row is an object such as"),
        ("a.json", "[]", r"has no rows"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", r"a\.csv' has 3 cells instead of 2 in line 3\. Put quotes"),
        ("a.csv", "question,answer\n", r"has no rows"),
        ("a.txt", b"one\n\xff\xfe\n", r"a\.txt' is not UTF-8 text: line 2\. Save it as UTF-8\."),
        ("a.txt", "\n\n", r"has no rows"),
        ("a.jsonl", "", r"a\.jsonl' is empty\. Give a file with at least one row\."),
        ("a.parquet", "not parquet", r"a\.parquet' cannot be read as parquet: "),
        ("a.jsonl.gz", b"not gzip", r"a\.jsonl\.gz' is not a whole gzip file\. Compress it again"),
        ("a.docx", "x", r"suffixes \.json, .*, got 'a\.docx'\. Convert it"),
    ],
)
def test_broken_files_are_told_in_a_sentence(write: Any, name: str, content: Any, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        load_source(spec(write(name, content)))


def test_absent_names_are_told_with_what_is_there() -> None:
    with pytest.raises(DatasetError, match=r"no file, folder or bundled dataset 'data/absent\.json'\. Bundled: "):
        load_source(spec("data/absent.json"))


def test_absent_part_is_told_with_those_that_are_there(write: Any) -> None:
    with pytest.raises(DatasetError, match=r"has no part 'validation': it has train\. Set dataset_split=train\."):
        load_source(spec(write("a.jsonl", ROWS), dataset_split="validation"))


def test_of_the_parts_that_are_there_the_one_to_train_on_is_offered(tmp_path: Path) -> None:
    for part in ("test", "train"):
        (tmp_path / f"{part}.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    with pytest.raises(DatasetError, match=r"Set dataset_split=train\."):
        load_source(spec(str(tmp_path), dataset_split="foo"))


def test_a_wrong_slice_is_told_with_an_example(write: Any) -> None:
    with pytest.raises(DatasetError, match=r"dataset_split 'train\[a:b\]' .* For example train\[:100\]\."):
        load_source(spec(write("a.jsonl", ROWS), dataset_split="train[a:b]"))


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"holds no data file\. Put in train\.jsonl"):
        load_source(spec(str(tmp_path)))


def test_files_of_several_formats_are_refused(write: Any) -> None:
    write("set/a.jsonl", ROWS)
    with pytest.raises(DatasetError, match=r"several formats \(\.jsonl, \.txt\) for one part\. Name one file\."):
        load_source(spec(str(Path(write("set/b.txt", "x")).parent)))


def test_a_hub_name_without_the_hub_says_so() -> None:
    with pytest.raises(HubUnreachableError, match=r"dataset 'owner/name:config' is not on this computer"):
        load_source(spec("owner/name:config"))


@pytest.mark.parametrize("name", ["demo", "demo/pirate"])
def test_a_bundled_name_gives_training_and_held_out_rows(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write("demo/pirate/train.jsonl", ROWS[:3])
    write("demo/pirate/test.jsonl", ROWS[3:])
    monkeypatch.setattr("engine.presets.PRESETS", tmp_path)
    source = load_source(spec(name))
    assert (answers(source.training), answers(source.evaluation)) == (["a0", "a1", "a2"], ["a3"])

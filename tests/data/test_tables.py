"""One table, every format; what is missing or broken gets one sentence."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from heeler.data.prompts import load_prompts
from heeler.data.tables import read_rows
from heeler.policies.loading import load_tokenizer
from heeler.types import HeelerError

ROWS: list[dict[str, Any]] = [{"prompt": "é, b", "n": "1"}, {"prompt": 'say "x"\n\u2028y', "n": "2"}]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    datasets.disable_progress_bars()
    return tmp_path


def test_every_format_gives_the_same_rows(folder: Path, tiny_llama: str) -> None:
    lines = [
        '{"prompt": "é, b", "n": "1"}',
        '{"prompt": "say \\"x\\"\\n\u2028y", "n": "2"}',  # a line separator inside a string ends no line
    ]
    Path("a.jsonl").write_text("\n\n".join(lines), encoding="utf-8")
    Path("a.txt").write_text("\n".join(lines), encoding="utf-8")
    Path("lines.json").write_text("\n".join(lines), encoding="utf-8")
    Path("array.json").write_text("[" + ",".join(lines) + "]", encoding="utf-8")
    Path("a.csv").write_text('prompt,n\n"é, b",1\n\n"say ""x""\n\u2028y",2\n', encoding="utf-8-sig")
    Path("a.tsv").write_text('prompt\tn\né, b\t1\n"say ""x""\n\u2028y"\t2\n', encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), "a.parquet")
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk("saved")
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk("splits")
    tokenizer = load_tokenizer(tiny_llama)
    sources = ["a.jsonl", "a.txt", "lines.json", "array.json", "a.csv", "a.tsv", "a.parquet", "saved", "splits"]
    for source in [*sources, str(folder / "a.parquet"), str(folder / "saved")]:
        assert read_rows(source) == ROWS, source
        prompts = load_prompts(source, tokenizer, max_tokens=None)
        assert prompts.prompts == [row["prompt"] for row in ROWS] and prompts.columns == {"n": ["1", "2"]}
    assert read_rows("splits:test") == ROWS[1:]


def test_columnar_formats_keep_messages_as_they_were(folder: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    rows = [{"prompt": [{"role": "user", "content": "a"}, call], "level": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "a.parquet")
    datasets.Dataset.from_list(rows).save_to_disk("saved")
    assert read_rows("a.parquet") == read_rows("saved") == rows


def test_a_long_cell(folder: Path) -> None:
    Path("a.csv").write_text("prompt\n" + "x" * 200_000 + "\n")
    assert len(read_rows("a.csv")[0]["prompt"]) == 200_000


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', "a.jsonl, line 2: broken JSON"),
        ("a.jsonl", b'["a"]\n', "a.jsonl, line 1: expected an object"),
        ("a.jsonl", b"\xff\xfe", "a.jsonl is not UTF-8 text"),
        ("a.json", b'[{"a": 1},\n{"a": ]', "a.json, line 2: broken JSON"),
        ("a.json", b'[{"a": 1}, 7]', "a.json, row 2: expected an object, got 7"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", "a.csv, line 3: 3 cells, but the header names 2"),
        ("a.csv", b"a,b\n1\n", "a.csv, line 2: 1 cells, but the header names 2"),
        ("a.csv", b"a,a\n1,2\n", "empty or repeated name"),
        ("a.csv", b'a,b\n"1"x,2\n', "a.csv, line 2: broken CSV"),
        ("a.csv", b"\xff\xfe", "a.csv is not UTF-8 text"),
        ("a.parquet", b"no parquet at all", "cannot read a.parquet as Parquet"),
        ("saved/state.json", b"{", "cannot load the data set in saved"),
    ],
)
def test_broken_files(folder: Path, file: str, content: bytes, says: str) -> None:
    Path(file).parent.mkdir(exist_ok=True)
    Path(file).write_bytes(content)
    sentence(says, file.split("/")[0])


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("absent.jsonl", "there is no file absent.jsonl"),
        ("absent.csv", "there is no file absent.csv"),
        ("absent.parquet", "there is no file absent.parquet"),
        ("./absent", "there is no file or folder './absent'"),
        ("", "there is no file or folder ''"),
        ("plain", "the folder plain was not saved by datasets"),
        ("splits:tset", r"has no split 'tset' \(did you mean test\?\): write splits:SPLIT with one of train, test"),
        ("saved:train", "the data set in saved has no splits: leave out ':train'"),
        ("a/b/c/d", "'a/b/c/d', and it is no id of a data set either"),
        ("nobody/nothing", "datasets could not get it from the hub"),
    ],
)
def test_sources_that_are_not_there(folder: Path, source: str, says: str) -> None:
    Path("plain").mkdir()
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk("saved")
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk("splits")
    started = time.perf_counter()
    sentence(says, source)
    assert time.perf_counter() - started < 10  # tests are offline; datasets alone tries for half a minute


def test_a_data_set_of_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def load_dataset(*args: Any, **options: Any) -> datasets.Dataset:
        calls.append((args, options, datasets.config.HF_HUB_OFFLINE))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    for source in ("imdb", "o/n", "o/n:test", "o/n/c", "o/n/c:train[:10]"):
        assert read_rows(source) == ROWS
    assert [call[:2] for call in calls] == [
        (("imdb", None), {"split": "train"}),
        (("o/n", None), {"split": "train"}),
        (("o/n", None), {"split": "test"}),
        (("o/n", "c"), {"split": "train"}),
        (("o/n", "c"), {"split": "train[:10]"}),
    ]
    assert all(call[2] for call in calls)  # no hub in the tests: the cache is all there is
    assert datasets.config.HF_HUB_OFFLINE is False

    def fail(*args: Any, **options: Any) -> None:
        raise ValueError("Unknown split 'tset'.\nA second line.")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    error = sentence(r"the data set 'o/n', split 'tset': .*\(Unknown split 'tset'\); check the name", "o/n:tset")
    assert "second line" not in str(error)


def test_missing_packages(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("a.parquet").write_bytes(b"")
    monkeypatch.setattr("heeler.runtime.packages.find_spec", lambda name: None)
    sentence(r"needs the package pyarrow.*heeler\[data\]", "a.parquet")
    sentence(r"needs the package datasets.*heeler\[data\]", "o/n")


def sentence(says: str, source: str) -> HeelerError:
    with pytest.raises(HeelerError, match=says) as caught:
        read_rows(source)
    assert "\n" not in str(caught.value)
    return caught.value

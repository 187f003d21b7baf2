"""Rows from files and data sets: JSONL, JSON, CSV, Parquet, and whatever `datasets` loads.

A source is a string, looked at in this order:

| source | read as |
|---|---|
| an existing file, or a name that ends in .jsonl, .json, .csv, .tsv or .parquet | that format; a file with any other ending is JSONL |
| `FOLDER` or `FOLDER:SPLIT` of an existing folder | what `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote |
| `NAME`, `OWNER/NAME` or `OWNER/NAME/CONFIG`, each with `:SPLIT` or without | a data set of the hub, or of its local cache where the hub does not answer |

The split of a data set is `train` unless it is given; slices such as `train[:1000]` work on the hub's data sets.
"""  # noqa: E501

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from heeler.runtime.packages import did_you_mean, require
from heeler.types import HeelerError

_ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def read_rows(source: str) -> list[dict[str, Any]]:
    """The rows of a file or a data set, one dict each.

    CSV has a header, and its values are strings. Columnar sources give every nested object the keys of all, null
    where it had none: those keys are left out again, but for a message's `content`, which may be null by right.

    Raises:
        HeelerError: nothing there, not readable in its format, no such split or config, a hub that does not answer.
    """
    path = Path(source).expanduser()
    ending = path.suffix.lower()
    if path.is_file() or (ending in _ENDINGS and not path.is_dir()):
        if ending == ".parquet":
            return _read_parquet(source)
        if ending in (".csv", ".tsv"):
            return _read_csv(source, "," if ending == ".csv" else "\t")
        return _read_json(source) if ending == ".json" else read_jsonl(source)
    name, _, split = source.partition(":")
    if name and Path(name).expanduser().is_dir():
        return _read_saved(name, split)
    if not name or name.startswith((".", "/", "~")):
        raise HeelerError(f"there is no file or folder {source!r}: give a file of rows or the id of a data set")
    return _read_hub(name, split or "train")


def named_rows(source: str | Sequence[Any], name: str | None) -> tuple[list[dict[str, Any]], str]:
    """The rows of a source or of a list, at least one, and what to call them in messages."""
    if isinstance(source, str):
        rows, name = read_rows(source), name or source
    else:
        name = name or "the rows"
        for number, row in enumerate(source, start=1):
            if not isinstance(row, Mapping):
                raise HeelerError(f"{name}, row {number}: expected an object with named columns, got {row!r:.60}")
        rows = [dict(row) for row in source]
    if not rows:
        raise HeelerError(f"{name}: there are no rows in it")
    return rows, name


def read_jsonl(path: str) -> list[dict[str, Any]]:
    """The objects of a JSONL file; blank lines are skipped, a broken line is named by its number."""
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(_text(path, "a JSONL file with one object a line").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise HeelerError(f"{path}, line {number}: broken JSON ({error.msg} at column {error.colno})") from error
        if not isinstance(row, dict):
            raise HeelerError(
                f'{path}, line {number}: expected an object such as {{"prompt": ...}}, got {line.strip()[:40]}'
            )
        rows.append(row)
    return rows


def _text(path: str, wanted: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise HeelerError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8"
        ) from error
    except FileNotFoundError as error:
        raise HeelerError(f"there is no file {path}: give {wanted}") from error
    except OSError as error:
        raise HeelerError(f"cannot read {path} ({error.strerror}): give {wanted}") from error


def _read_json(path: str) -> list[dict[str, Any]]:
    text = _text(path, "a JSON file with an array of objects or one object a line")
    if not text.lstrip().startswith("["):
        return read_jsonl(path)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise HeelerError(f"{path}, line {error.lineno}: broken JSON ({error.msg} at column {error.colno})") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise HeelerError(f"{path}, row {number}: expected an object, got {json.dumps(row)[:40]}")
    return rows


def _read_csv(path: str, delimiter: str) -> list[dict[str, Any]]:
    text = _text(path, "a CSV file with a header")
    before = csv.field_size_limit(2**31 - 1)  # the limit for a cell is otherwise 131,072 characters
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[dict[str, Any]] = []
    try:
        header = next(reader, [])
        if len(set(header)) < len(header) or not all(header):
            raise HeelerError(f"{path}: its header ({', '.join(header)}) has an empty or repeated name: name each once")
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise HeelerError(
                    f"{path}, line {reader.line_num}: {len(cells)} cells, but the header names {len(header)}: quote"
                    " cells that contain the delimiter"
                )
            rows.append(dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise HeelerError(f"{path}, line {reader.line_num}: broken CSV ({error})") from error
    finally:
        csv.field_size_limit(before)
    return rows


def _read_parquet(path: str) -> list[dict[str, Any]]:
    require("pyarrow", "data")
    import pyarrow
    import pyarrow.parquet

    file = Path(path).expanduser()
    if not file.is_file():
        raise HeelerError(f"there is no file {path}: give a Parquet file")
    try:
        with file.open("rb") as stream:
            table = pyarrow.parquet.read_table(stream)
    except (pyarrow.ArrowException, OSError) as error:
        raise HeelerError(f"cannot read {path} as Parquet ({_reason(error)}): write it again") from error
    return [_without_nested_nulls(row) for row in table.to_pylist()]


def _read_saved(folder: str, split: str) -> list[dict[str, Any]]:
    require("datasets", "data")
    import datasets

    path = Path(folder).expanduser()
    saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
    if not saved:
        raise HeelerError(f"the folder {folder} was not saved by datasets: give one of its files")
    try:
        loaded: Any = datasets.load_from_disk(str(path))
    except Exception as error:  # broken JSON, missing Arrow files: datasets has no common error
        raise HeelerError(f"cannot load the data set in {folder} ({_reason(error)}): save it again") from error
    if isinstance(loaded, datasets.DatasetDict):
        wanted, splits = split or "train", [str(name) for name in loaded]
        if wanted not in splits:
            raise HeelerError(
                f"the data set in {folder} has no split {wanted!r}{did_you_mean(wanted, splits)}: write"
                f" {folder}:SPLIT with one of {', '.join(splits)}"
            )
        loaded = loaded[wanted]
    elif split:
        raise HeelerError(f"the data set in {folder} has no splits: leave out {':' + split!r}")
    return [_without_nested_nulls(row) for row in loaded.to_list()]


def _read_hub(name: str, split: str) -> list[dict[str, Any]]:
    parts = name.split("/")
    if len(parts) > 3 or not all(parts):
        raise HeelerError(
            f"there is no file or folder {name!r}, and it is no id of a data set either: write OWNER/NAME,"
            " OWNER/NAME/CONFIG or OWNER/NAME:SPLIT"
        )
    require("datasets", "data")
    import datasets

    try:
        with _hub_or_cache(datasets):
            loaded: Any = datasets.load_dataset("/".join(parts[:2]), parts[2] if len(parts) == 3 else None, split=split)
        return [_without_nested_nulls(row) for row in loaded.to_list()]
    except Exception as error:  # whatever a data set's builder raises
        raise HeelerError(
            f"cannot load the data set {name!r}, split {split!r}: there is no such file or folder here, and datasets"
            f" could not get it from the hub ({_reason(error)}); check the name or give a local file"
        ) from error


@contextmanager
def _hub_or_cache(datasets: Any) -> Iterator[None]:
    """Look at the cache only, where the hub does not answer one request in 5 s: datasets itself tries for half a
    minute."""
    from huggingface_hub.utils import get_session

    before = datasets.config.HF_HUB_OFFLINE
    try:
        get_session().head(datasets.config.HF_ENDPOINT, timeout=5)
    except Exception:
        datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _without_nested_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _strip(value) for key, value in row.items()}


def _strip(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _strip(inner) for key, inner in value.items() if inner is not None or key == "content"}
    return [_strip(inner) for inner in value] if isinstance(value, list) else value


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0][:200] if lines else type(error).__name__).rstrip(".")

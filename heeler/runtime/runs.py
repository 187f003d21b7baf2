"""The run folder: config.json, metrics.jsonl, samples.jsonl, summary.json, TensorBoard events, checkpoints/."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from heeler.types import HeelerError

CHECKPOINT_FORMAT = 1
EVENTS_EVERY = 0.5  # seconds
FULL = (errno.ENOSPC, errno.EDQUOT)


class NotWritten(HeelerError):
    """A run folder cannot be written. The sentence says how to go on, so nobody need add that."""


def why_not_written(error: BaseException) -> str | None:
    """What the system said, where the error is that a file cannot be written; None for any other error.

    Libraries below Python tell a full disk by their message only: safetensors in an error of its own, torch in a
    RuntimeError whose words depend on where it noticed.
    """
    if isinstance(error, OSError):
        return error.strerror or str(error)
    text = next(iter(str(error).splitlines()), "")
    if any(sign in text for sign in ("PytorchStreamWriter failed", "unexpected pos", "iostream error")):
        return "the file was cut short, as on a full disk"
    return text if "No space left" in text or "Disk quota exceeded" in text else None


def write_json(path: Path, data: Any) -> None:
    """Write aside and rename, so that a reader never sees half a file."""
    _write_aside(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def _write_aside(path: Path, text: str) -> None:
    aside = path.with_name(path.name + ".partial")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise HeelerError(f"there is no file {path}: is {path.parent} a run folder?") from error
    except json.JSONDecodeError as error:
        raise HeelerError(f"{path}, line {error.lineno}: broken JSON ({error.msg})") from error


def _finite(value: float) -> float | None:
    """JSON has no NaN: a metric that is undefined is written as null."""
    return value if math.isfinite(value) else None


class RunFolder:
    """One run's files. `create` refuses a folder that holds a run already; `open` continues one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._events: Any = None
        self._events_written = -math.inf
        self._excepthook: Any = None  # of threads, as it was before TensorBoard's began

    @classmethod
    def create(cls, path: str | Path) -> RunFolder:
        path = Path(path)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise HeelerError(
                f"{path} exists already: choose another --out, delete it, or continue it with: heeler resume {path}"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise HeelerError(f"cannot create the run folder {path}: {error.strerror}") from error
        return cls(path)

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        path = Path(path)
        if not (path / "config.json").is_file():
            raise HeelerError(f"{path} is no run folder: it has no config.json")
        return cls(path)

    @contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Say in one sentence how to go on where a block cannot write `what`, for lack of space or of permission.

        Raises:
            NotWritten: that sentence.
        """
        try:
            yield
        except NotWritten:
            raise
        except Exception as error:
            reason = why_not_written(error)
            if reason is None:
                raise
            full = not isinstance(error, OSError) or error.errno in FULL
            remedy, last = "free some space" if full else "make it writable", self.last_checkpoint()
            raise NotWritten(
                f"cannot write {what}: {reason}; "
                + (
                    f"there is no earlier checkpoint; {remedy}, delete {self.path} and start again"
                    if last is None
                    else f"the checkpoint of update {last} stays; {remedy} and continue with: heeler resume {self.path}"
                )
            ) from error

    def write_config(self, config: Mapping[str, Any]) -> None:
        with self.writing(f"{self.path}/config.json"):
            write_json(self.path / "config.json", config)

    def read_config(self) -> dict[str, Any]:
        return read_json(self.path / "config.json")

    def log(self, metrics: Mapping[str, float], samples: Sequence[Mapping[str, Any]] = ()) -> None:
        """Append one update to metrics.jsonl (flushed), its samples, and TensorBoard."""
        with (
            self.writing(f"{self.path}/metrics.jsonl"),
            (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file,
        ):
            file.write(json.dumps({k: _finite(v) for k, v in metrics.items()}) + "\n")
        self.write_samples(samples)
        now = time.monotonic()
        if now - self._events_written < EVENTS_EVERY:
            return  # TensorBoard costs milliseconds an update: a run that does many a second logs some of them there
        self._events_written = now
        with self.writing(f"the TensorBoard events in {self.path}"):
            if self._events is None:
                from torch.utils.tensorboard.writer import SummaryWriter

                if self._excepthook is None:
                    self._excepthook, threading.excepthook = threading.excepthook, self._thread_failed
                self._events = SummaryWriter(str(self.path))
            for name, value in metrics.items():
                if name != "step" and math.isfinite(value):
                    self._events.add_scalar(name, value, int(metrics["step"]))

    def _thread_failed(self, args: Any) -> None:
        """TensorBoard writes in a thread, whose error comes up at the next call: no traceback of its own."""
        if why_not_written(args.exc_value) is None:
            self._excepthook(args)

    def write_samples(self, samples: Sequence[Mapping[str, Any]]) -> None:
        """Append to samples.jsonl."""
        if samples:
            with (
                self.writing(f"{self.path}/samples.jsonl"),
                (self.path / "samples.jsonl").open("a", encoding="utf-8") as file,
            ):
                file.writelines(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)

    def metrics(self) -> list[dict[str, Any]]:
        file = self.path / "metrics.jsonl"
        rows = map(_row, file.read_text(encoding="utf-8").splitlines()) if file.exists() else ()
        return [row for row in rows if row is not None]

    def amend(self, metrics: Mapping[str, float]) -> None:
        """Add metrics to the last update of metrics.jsonl."""
        file = self.path / "metrics.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines()
        lines[-1] = json.dumps(json.loads(lines[-1]) | {k: _finite(v) for k, v in metrics.items()})
        self._replace_lines(file, lines)

    def forget_after(self, step: int) -> None:
        """Drop logged updates after `step`: a resumed run does them again. A line that was cut goes too."""
        for name in ("metrics.jsonl", "samples.jsonl"):
            file = self.path / name
            if file.exists():
                lines = file.read_text(encoding="utf-8").splitlines()
                rows = [(line, row) for line in lines if (row := _row(line)) is not None]
                self._replace_lines(file, [t for t, row in rows if int(row.get("step", row.get("update", 0))) <= step])

    def _replace_lines(self, file: Path, lines: Sequence[str]) -> None:
        with self.writing(str(file)):
            _write_aside(file, "".join(line + "\n" for line in lines))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        with self.writing(f"{self.path}/summary.json"):
            write_json(self.path / "summary.json", summary)

    def close(self) -> None:
        events, self._events = self._events, None
        try:
            if events is not None:
                with self.writing(f"the TensorBoard events in {self.path}"):
                    events.close()
        finally:
            if self._excepthook is not None:
                threading.excepthook, self._excepthook = self._excepthook, None

    def export(self, write: Callable[[Path], None], into: Path) -> None:
        """Let `write` fill an empty folder, then rename: what others load from `into` is whole, or as it was."""
        aside = into / "export.partial"
        with self.writing(f"the policy to {into}"):
            shutil.rmtree(aside, ignore_errors=True)
            try:
                aside.mkdir(parents=True)
                write(aside)
                for part in sorted(aside.iterdir()):
                    shutil.rmtree(into / part.name, ignore_errors=True)
                    os.replace(part, into / part.name)
            finally:
                shutil.rmtree(aside, ignore_errors=True)

    # checkpoints ----------------------------------------------------------------------------------------------

    def save_checkpoint(self, step: int, state: Mapping[str, Any], keep: Sequence[int] = ()) -> Path:
        """Write aside, rename, then delete older ones except those in `keep`; the last good one always stays."""
        import torch

        folder = self.path / "checkpoints"
        final, aside = folder / f"step-{step:06d}", folder / f"step-{step:06d}.partial"
        try:
            with self.writing(f"the checkpoint of update {step} to {folder}"):
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
                torch.save({"format": CHECKPOINT_FORMAT, "step": step, **state}, aside / "state.pt")
                shutil.rmtree(final, ignore_errors=True)
                os.replace(aside, final)
        except NotWritten:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        for other in self.checkpoint_steps():
            if other < step and other not in keep:
                shutil.rmtree(folder / f"step-{other:06d}", ignore_errors=True)
        return final

    def checkpoint_steps(self) -> list[int]:
        folder = self.path / "checkpoints"
        names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
        return sorted(int(n.removeprefix("step-")) for n in names if n.removeprefix("step-").isdigit())

    def last_checkpoint(self) -> int | None:
        steps = self.checkpoint_steps()
        return steps[-1] if steps else None

    def load_checkpoint(self, step: int) -> dict[str, Any]:
        import torch

        file = self.path / "checkpoints" / f"step-{step:06d}" / "state.pt"
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError) as error:
            raise HeelerError(f"the checkpoint {file} cannot be read ({str(error).splitlines()[0]})") from error
        if state.get("format") != CHECKPOINT_FORMAT:
            raise HeelerError(
                f"the checkpoint {file} has format {state.get('format')}, this version reads {CHECKPOINT_FORMAT}"
            )
        return state


def _row(line: str) -> dict[str, Any] | None:
    """A line of JSONL; None where it is empty, or was cut when the run was killed or the disk was full."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None

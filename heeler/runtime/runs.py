"""The run folder: config.json, metrics.jsonl, samples.jsonl, summary.json, TensorBoard events, checkpoints/."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from heeler.types import HeelerError

CHECKPOINT_FORMAT = 1
EVENTS_EVERY = 0.5  # seconds


def write_json(path: Path, data: Any) -> None:
    """Write aside and rename, so that a reader never sees half a file."""
    aside = path.with_name(path.name + ".partial")
    aside.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(aside, path)


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

    def write_config(self, config: Mapping[str, Any]) -> None:
        write_json(self.path / "config.json", config)

    def read_config(self) -> dict[str, Any]:
        return read_json(self.path / "config.json")

    def log(self, metrics: Mapping[str, float], samples: Sequence[Mapping[str, Any]] = ()) -> None:
        """Append one update to metrics.jsonl (flushed), its samples, and TensorBoard."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({k: _finite(v) for k, v in metrics.items()}) + "\n")
        self.write_samples(samples)
        now = time.monotonic()
        if now - self._events_written < EVENTS_EVERY:
            return  # TensorBoard costs milliseconds an update: a run that does many a second logs some of them there
        self._events_written = now
        if self._events is None:
            from torch.utils.tensorboard.writer import SummaryWriter

            self._events = SummaryWriter(str(self.path))
        for name, value in metrics.items():
            if name != "step" and math.isfinite(value):
                self._events.add_scalar(name, value, int(metrics["step"]))

    def write_samples(self, samples: Sequence[Mapping[str, Any]]) -> None:
        """Append to samples.jsonl."""
        if samples:
            with (self.path / "samples.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)

    def metrics(self) -> list[dict[str, Any]]:
        file = self.path / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines() if line.strip()] if file.exists() else []

    def amend(self, metrics: Mapping[str, float]) -> None:
        """Add metrics to the last update of metrics.jsonl."""
        file = self.path / "metrics.jsonl"
        lines = file.read_text().splitlines()
        lines[-1] = json.dumps(json.loads(lines[-1]) | {k: _finite(v) for k, v in metrics.items()})
        _replace_lines(file, lines)

    def forget_after(self, step: int) -> None:
        """Drop logged updates after `step`: a resumed run does them again."""
        for name in ("metrics.jsonl", "samples.jsonl"):
            file = self.path / name
            if file.exists():
                kept = [line for line in file.read_text().splitlines() if line.strip() and _step_of(line) <= step]
                _replace_lines(file, kept)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        write_json(self.path / "summary.json", summary)

    def close(self) -> None:
        if self._events is not None:
            self._events.close()
            self._events = None

    # checkpoints ----------------------------------------------------------------------------------------------

    def save_checkpoint(self, step: int, state: Mapping[str, Any], keep: Sequence[int] = ()) -> Path:
        """Write aside, rename, then delete older ones except those in `keep`; the last good one always stays."""
        import torch

        folder = self.path / "checkpoints"
        final, aside = folder / f"step-{step:06d}", folder / f"step-{step:06d}.partial"
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            torch.save({"format": CHECKPOINT_FORMAT, "step": step, **state}, aside / "state.pt")
            shutil.rmtree(final, ignore_errors=True)
            os.replace(aside, final)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            shutil.rmtree(aside, ignore_errors=True)
            last = self.last_checkpoint()
            stays = f"the checkpoint of update {last} stays" if last is not None else "there is no earlier checkpoint"
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
            raise HeelerError(
                f"cannot write the checkpoint of update {step} to {folder}: {reason}; {stays}; free some space and"
                f" continue with: heeler resume {self.path}"
            ) from error
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


def _replace_lines(file: Path, lines: Sequence[str]) -> None:
    aside = file.with_name(file.name + ".partial")
    aside.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    os.replace(aside, file)


def _step_of(line: str) -> int:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return 2**62  # a line that was cut when the run was killed
    return int(row.get("step", row.get("update", 0)))

"""The life of a PPO run, whatever it trains: the folder, the loop, interrupts, evaluation, checkpoints, the end."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from heeler.runtime import machine
from heeler.runtime.configs import to_json
from heeler.runtime.progress import progress, say
from heeler.runtime.reduce import LocalReduce
from heeler.runtime.runs import NotWritten, RunFolder, read_json
from heeler.train.ppo import LoopConfig, Revalue, Score, TrainState, UpdateReport, train_loop
from heeler.types import Collector, HeelerError, Reduce, Unavailable

COUNTERS = ("step", "kl_coef", "decisions", "episodes", "seconds")
OnUpdate = Callable[[UpdateReport], None]


class RunConfig(LoopConfig, Protocol):
    """What the life of a run reads of its config."""

    @property
    def eval_every(self) -> int: ...
    @property
    def checkpoint_every(self) -> int: ...


@dataclass(kw_only=True)
class Run:
    """An assembled run. Subclasses say how to collect, score, evaluate and export.

    Attributes:
        config: frozen; written into config.json.
        state: what training changes.
        folder: where it is written; None until training begins.
        notes: what was chosen at start, for the log and config.json.
        summary: becomes summary.json.
        reduce: sums over the processes of the run.
    """

    verb = ""
    seconds_between_saves = math.inf  # besides those of `checkpoint_every`
    best_figure = "reward"  # of an evaluation: the policy with the highest is kept
    rollouts_are_pure = False  # collecting changes nothing that a checkpoint holds

    config: Any
    state: TrainState
    folder: RunFolder | None = None
    notes: list[str]
    summary: dict[str, Any] = field(default_factory=dict[str, Any])
    reduce: Reduce = field(default_factory=LocalReduce)

    def collector(self) -> Collector:
        raise NotImplementedError

    def score(self) -> Score:
        raise NotImplementedError

    def revalue(self) -> Revalue | None:
        """How a scored rollout gets the values of the critic as it is now; None where the run does not offer it."""
        return None

    def can_evaluate(self) -> bool:
        raise NotImplementedError

    def figures(self, show: bool, note: str) -> dict[str, float]:
        """Held-out figures of the policy as it is; `note` is "before", "after" or ""."""
        raise NotImplementedError

    def export(self, folder: Path) -> None:
        """Write what others load into an empty folder: the policy, and the critic beside it."""
        raise NotImplementedError

    def describe(self, metrics: Mapping[str, float]) -> str:
        """One line about an update."""
        raise NotImplementedError

    def describe_evaluation(self, figures: Mapping[str, float]) -> str:
        raise NotImplementedError

    def samples(self, report: UpdateReport) -> list[dict[str, Any]]:
        """Lines for samples.jsonl."""
        return []

    def resolved(self) -> dict[str, Any]:
        """What was chosen at start and must be the same when the run is resumed."""
        device = str(self.state.policy.device)
        return {"threads": torch.get_num_threads(), "device": device, "notes": self.notes, "torch": torch.__version__}

    def save_state(self) -> dict[str, Any]:
        """Whatever else a checkpoint must hold."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None: ...


def begin(run: Run, folder: RunFolder, on_update: OnUpdate | None, extra: Mapping[str, Any] | None, show: bool) -> None:
    """Write the run's first files and train it."""
    run.folder = folder
    folder.write_config({"verb": run.verb, "config": to_json(run.config), "resolved": run.resolved()})
    run.summary.update(extra or {})
    folder.write_summary(run.summary)
    save(run, keep_best=None)  # from here on the run can be resumed
    advance(run, on_update, show)


def at_least(limits: Mapping[str, tuple[float, float]]) -> None:
    """Raise a sentence where an option, by its name on the command line, is less than its least value."""
    for name, (value, least) in limits.items():
        if not value >= least:
            raise HeelerError(f"{name} must be at least {least}, not {value}")


def at_most(limits: Mapping[str, tuple[float, float]]) -> None:
    """Raise a sentence where an option, by its name on the command line, is more than its largest value."""
    for name, (value, most) in limits.items():
        if not value <= most:
            raise HeelerError(f"{name} must be at most {most}, not {value}")


@contextmanager
def new_folder(path: str) -> Iterator[RunFolder]:
    """A run folder that disappears again where the run cannot be assembled."""
    folder = RunFolder.create(path)
    try:
        yield folder
    except BaseException:
        if not any(folder.path.iterdir()):
            folder.path.rmdir()
        raise


def restore(run: Run, folder: RunFolder) -> None:
    """Put an assembled run into the state of its folder's last checkpoint."""
    step = folder.last_checkpoint()
    if step is None:
        raise HeelerError(f"{folder.path} has no checkpoint to continue from")
    run.folder = folder
    checkpoint = folder.load_checkpoint(step)
    run.state.policy.load_state_dict(checkpoint["weights"])
    run.state.optimizer.load_state_dict(checkpoint["optimizer"])
    run.state.generator.set_state(checkpoint["generator"])
    machine.restore_random_states(checkpoint["random"])
    for name in COUNTERS:
        setattr(run.state, name, checkpoint["state"][name])
    run.load_state(checkpoint.get("more", {}))
    if (folder.path / "summary.json").exists():
        run.summary = read_json(folder.path / "summary.json")


def resume(run: Run, on_update: OnUpdate | None, show: bool) -> None:
    """Continue a restored run to its number of updates."""
    folder = run.folder
    assert folder is not None
    evaluated = not run.can_evaluate() or "eval/after" in run.summary
    exported = run.summary.get("exported") == run.state.step
    if run.state.step >= run.config.updates and evaluated and exported:
        raise HeelerError(
            f"{folder.path} is complete: it has done {run.state.step} updates; give a larger --updates N to go on"
        )
    folder.write_config({**folder.read_config(), "config": to_json(run.config)})
    folder.forget_after(run.state.step)
    say(f"continuing {folder.path} after update {run.state.step}", show)
    advance(run, on_update, show)


def save(run: Run, keep_best: int | None) -> None:
    assert run.folder is not None
    state = run.state
    run.folder.save_checkpoint(
        state.step,
        {
            "weights": state.policy.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            "generator": state.generator.get_state(),
            "random": machine.random_states(),
            "state": {name: getattr(state, name) for name in COUNTERS},
            "more": run.save_state(),
        },
        keep=[] if keep_best is None else [keep_best],
    )


def advance(run: Run, on_update: OnUpdate | None, show: bool) -> None:
    """Train from the run's state to its end, evaluate and export."""
    assert run.folder is not None
    try:
        _train_and_export(run, on_update, show)
    except KeyboardInterrupt as interrupt:
        said = str(interrupt) or "interrupted"
        if "heeler resume" in said:
            raise
        raise KeyboardInterrupt(f"{said}; continue with: heeler resume {run.folder.path}") from None
    except NotWritten:
        raise
    except HeelerError as error:
        raise type(error)(
            f"{error} [after update {run.state.step}; {run.folder.path} holds update {run.folder.last_checkpoint()},"
            f" continue it with: heeler resume {run.folder.path}]"
        ) from error


def _train_and_export(run: Run, on_update: OnUpdate | None, show: bool) -> None:
    config, state, folder = run.config, run.state, run.folder
    assert folder is not None
    collector = run.collector()
    for note in run.notes:
        say(note, show)
    if state.step == 0 and run.can_evaluate():
        say("evaluating before training", show)
        run.summary["eval/before"] = run.figures(show, "before")
        folder.write_summary(run.summary)
    if state.step < config.updates:
        run.summary.pop("eval/after", None)  # of an earlier end, before the run was given more updates
    logged = (folder.metrics() or [{}])[-1]
    if _evaluation_is_due(run) and logged.get("step") == state.step and not any(n.startswith("eval/") for n in logged):
        folder.amend(_keep_if_best(run, show))  # the reward was not available when the update was logged
    bar = progress(config.updates, "PPO", "update", done=state.step, show=show)
    started = time.perf_counter()
    last_said, last_saved = -math.inf, started
    random = _random_states(run)
    trained = False
    with interruptible() as interrupted:

        def after_update(report: UpdateReport) -> bool:
            nonlocal last_said, last_saved, random
            random = _random_states(run)
            unavailable = None
            if _evaluation_is_due(run):
                try:
                    report = replace(report, metrics=report.metrics | _keep_if_best(run, show))
                except Unavailable as error:
                    unavailable = error  # the update itself is done: it is logged before the run gives up
            folder.log(report.metrics, run.samples(report))
            bar.update(1)
            now = time.perf_counter()
            if now - last_said > 1.0 or state.step == config.updates:  # fast runs do many updates a second
                say(run.describe(report.metrics), show)
                last_said = now
            if on_update is not None:
                on_update(report)
            if unavailable is not None:
                raise unavailable
            random = _random_states(run)
            best = run.summary.get("best", {}).get("step")
            due = state.step % config.checkpoint_every == 0 or state.step == config.updates
            if due or interrupted.is_set() or time.perf_counter() - last_saved > run.seconds_between_saves:
                save(run, keep_best=best)
                last_saved = time.perf_counter()
            return not interrupted.is_set()

        try:
            train_loop(state, collector, run.score(), config, run.reduce, after_update, run.revalue())
            trained = True
        except Unavailable:  # the weights are those of the last update
            if run.rollouts_are_pure and folder.last_checkpoint() != state.step:
                machine.restore_random_states(random)  # the reward that failed may have drawn some
                save(run, keep_best=run.summary.get("best", {}).get("step"))
            raise
        finally:
            bar.close()
            run.summary["seconds/ppo"] = run.summary.get("seconds/ppo", 0.0) + time.perf_counter() - started
            run.summary["peak_memory_gib"] = round(machine.peak_memory_gib(), 2)
            run.summary["updates"] = state.step
            run.summary |= {k: v for k, v in (folder.metrics() or [{}])[-1].items() if k != "step"}
            with nullcontext() if trained else suppress(NotWritten):  # what stopped the run is what is told
                folder.close()
                folder.write_summary(run.summary)
    if interrupted.is_set() and state.step < config.updates:
        raise KeyboardInterrupt(f"stopped after update {state.step}; continue with: heeler resume {folder.path}")
    folder.export(run.export, folder.path)
    run.summary["exported"] = state.step
    folder.write_summary(run.summary)
    if run.can_evaluate():
        say("evaluating after training", show)
        after = run.figures(show, "after")
        run.summary["eval/after"] = after
        best = run.summary.get("best")
        if best is not None and after[run.best_figure] > best[run.best_figure]:
            run.summary["best"] = {"step": state.step, **after}
            folder.export(run.export, folder.path / "best")
    run.summary["peak_memory_gib"] = round(machine.peak_memory_gib(), 2)
    folder.write_summary(run.summary)


def _random_states(run: Run) -> dict[str, Any]:
    """Of all generators, where an update can begin again after its reward failed. (Others do many updates a second.)"""
    return machine.random_states() if run.rollouts_are_pure else {}


def _evaluation_is_due(run: Run) -> bool:
    """Whether the update that was done last is one of those that `eval_every` evaluates."""
    every = run.config.eval_every
    return run.state.step > 0 and run.can_evaluate() and every > 0 and run.state.step % every == 0


def _keep_if_best(run: Run, show: bool) -> dict[str, float]:
    """Evaluate; keep policy and checkpoint where the held-out figure is the best so far. Returns the figures."""
    assert run.folder is not None
    figures = run.figures(show, "")
    say(f"  held out: {run.describe_evaluation(figures)}", show)
    best = run.summary.get("best")
    if best is None or figures[run.best_figure] > best[run.best_figure]:
        run.summary["best"] = {"step": run.state.step, **figures}
        run.folder.export(run.export, run.folder.path / "best")
        save(run, keep_best=run.state.step)
        run.folder.write_summary(run.summary)
    return {f"eval/{name}": value for name, value in figures.items()}


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """The first Ctrl-C finishes the running update and saves; the second stops at once."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return

    def handle(signum: int, frame: Any) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt("stopped at once: the last checkpoint stays")
        interrupted.set()
        say("\nstopping after this update (Ctrl-C again stops at once)")

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def default_out(name: str) -> str:
    """runs/NAME, with a number where that exists."""
    base, number = Path("runs") / name, 1
    path = base
    while path.exists():
        number += 1
        path = base.with_name(f"{name}-{number}")
    return str(path)

"""`heeler reward --model M --data F`: a reward model from a user's own preferences or labels, in a run folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from heeler.data.preferences import Preference, check_disjoint, load_labels, load_preferences, split_by_prompt
from heeler.data.prompts import without_template
from heeler.data.tables import named_rows
from heeler.policies import loading
from heeler.runtime.configs import from_json, to_json
from heeler.runtime.progress import say
from heeler.runtime.runs import RunFolder
from heeler.train.reward import (
    LabelledTexts,
    PreferencePairs,
    RewardConfig,
    check_numbers,
    kept_training,
    most_tokens,
    train_reward_model,
)
from heeler.train.run import default_out, new_folder
from heeler.types import HeelerError


@dataclass(frozen=True, kw_only=True)
class RewardTask:
    """A reward model from preferences (prompt, chosen, rejected) or labelled texts (text, label).

    Attributes:
        data: a file (JSONL, CSV, Parquet) or a datasets id with these columns.
        eval_data: held-out rows; where None, `eval_share` of the prompts (or texts) is held out.
        eval_share: the share that is held out where there is no `eval_data`.
        out: the run folder; runs/reward where None.
        training: how it is trained.
    """

    data: str = ""
    eval_data: str | None = None
    eval_share: float = 0.1
    out: str | None = None
    training: Annotated[RewardConfig, tyro.conf.arg(name="")]


def train_reward(
    task: RewardTask,
    *,
    data: Sequence[Any] | None = None,
    eval_data: Sequence[Any] | None = None,
    show: bool = True,
) -> dict[str, Any]:
    """Train, and leave a run folder: config.json, metrics.jsonl, summary.json, scores.png, and `model/`.

    Args:
        task: what is trained on what.
        data, eval_data: lists of rows, in place of the task's files.
        show: print progress.

    Returns:
        what stands in summary.json.
    """
    with new_folder(task.out or default_out("reward")) as folder:
        train, test = _load(task, data, eval_data, show)
    config = {**to_json(task), "out": str(folder.path)}
    folder.write_config({"verb": "reward", "config": config})
    return _train(task.training, train, test, folder, show)


def resume_reward(
    path: str | Path,
    *,
    data: Sequence[Any] | None = None,
    eval_data: Sequence[Any] | None = None,
    show: bool = True,
) -> dict[str, Any]:
    """Continue an interrupted training from the state that it kept, or from the start where it kept none yet."""
    folder = RunFolder.open(path)
    if (folder.path / "summary.json").exists():
        raise HeelerError(f"{folder.path} is complete: a reward model is trained on the tokens that it was begun with")
    task: RewardTask = from_json(RewardTask, folder.read_config()["config"], str(folder.path / "config.json"))
    train, test = _load(task, data, eval_data, show)
    return _train(task.training, train, test, folder, show)


def _train(
    config: RewardConfig,
    train: LabelledTexts | PreferencePairs,
    test: LabelledTexts | PreferencePairs,
    folder: RunFolder,
    show: bool,
) -> dict[str, Any]:
    say(f"{len(train):,} {train.kind} to train on, {len(test):,} held out", show)
    cut, texts = train.texts.num_cut + test.texts.num_cut, len(train.texts.ids) + len(test.texts.ids)
    if cut:
        side = "beginning" if isinstance(train, PreferencePairs) else "end"
        say(f"{cut:,} of the {texts:,} texts lose their {side}: they have more than {train.texts.room} tokens", show)
    again = f"run: heeler resume {folder.path}"

    def start(step: int, resolved: dict[str, Any]) -> None:
        folder.write_config({**folder.read_config(), "resolved": {**resolved, "torch": torch.__version__}})
        folder.forget_after(step)

    try:
        report = train_reward_model(
            config, train, {"held_out": (test, None)}, folder.path / "model", show=show, on_start=start,
            on_step=folder.log, again=again,
        )  # fmt: skip
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(str(interrupt) or f"interrupted; to continue, {again}") from None
    finally:
        folder.close()
    scores = report.pop("scores", None)
    summary = {
        "eval/after": report["figures"]["held_out"], "kind": train.kind, "score": report["score"],
        "pairs_or_texts": {"train": len(train), "held_out": len(test)}, "seconds": report["seconds"],
        "updates": report["steps"],
    }  # fmt: skip
    folder.write_summary(summary)
    shutil.rmtree(kept_training(folder.path / "model"), ignore_errors=True)
    if scores is not None:
        chosen, rejected = scores["held_out"]
        draw_scores(chosen, rejected, folder.path / "scores.png", show)
    figures = report["figures"]["held_out"]
    say(
        f"held out: accuracy {figures['accuracy']:.1%}, log loss {figures['log_loss']:.3f} nats, calibration error"
        f" {figures['calibration_error']:.3f}; {folder.path}/model is a plain transformers folder, and a reward:"
        f" heeler ppo lm --reward {folder.path} ...",
        show,
    )
    return {**summary, "folder": str(folder.path)}


def _load(
    task: RewardTask, data: Sequence[Any] | None, eval_data: Sequence[Any] | None, show: bool
) -> tuple[LabelledTexts, LabelledTexts] | tuple[PreferencePairs, PreferencePairs]:
    source, held_out = data if data is not None else task.data, eval_data if eval_data is not None else task.eval_data
    if not source:
        raise HeelerError(
            "no data were given: --data FILE with prompt, chosen and rejected, or text and label (rows given from"
            " Python are given again to resume_reward)"
        )
    if not 0 < task.eval_share < 1:
        raise HeelerError(f"--eval-share is {task.eval_share}: it must lie between 0 and 1")
    check_numbers(task.training)
    tokenizer = loading.load_tokenizer(task.training.model)
    readable = most_tokens(task.training.model, tokenizer)
    limit = task.training.max_tokens if readable is None else min(task.training.max_tokens, readable)
    rows, name = named_rows(source, task.data or "the data")
    shares = {"train": 1 - task.eval_share, "held_out": task.eval_share}
    parts: Mapping[str, Any]
    if "chosen" in rows[0]:
        pairs = load_preferences(rows, tokenizer, max_tokens=None, name=name)
        if any(not isinstance(pair.prompt, str) and not pair.templated for pair in pairs):
            say(without_template(f"the model {task.training.model}"), show)
        if held_out:
            others = load_preferences(held_out, tokenizer, max_tokens=None, name=task.eval_data or "the held-out data")
            parts = {"train": pairs, "held_out": others}
            check_disjoint({part: [_identity(p) for p in of] for part, of in parts.items()})
        else:
            parts = split_by_prompt(pairs, shares, seed=task.training.seed, prompt=_identity)
        _both_parts(parts, name)
        train_pairs = PreferencePairs(parts["train"], tokenizer, limit, show)
        return train_pairs, PreferencePairs(parts["held_out"], tokenizer, limit)
    labelled = list(zip(*load_labels(rows, name=name), strict=True))
    if held_out:
        others = list(zip(*load_labels(held_out, name=task.eval_data or "the held-out data"), strict=True))
        parts = {"train": labelled, "held_out": others}
        check_disjoint({part: [text for text, _ in of] for part, of in parts.items()})
    else:
        parts = split_by_prompt(labelled, shares, seed=task.training.seed, prompt=lambda pair: pair[0])
    _both_parts(parts, name)
    for part, of in parts.items():
        if len({label for _, label in of}) == 1:
            raise HeelerError(
                f"{name}: after the split all {len(of)} labels of the part {part!r} are {of[0][1]}, and a reward model"
                " needs both classes: give more rows, another --eval-share or --seed, or --eval-data"
            )
    train, test = (
        LabelledTexts(
            [t for t, _ in parts[part]], [y for _, y in parts[part]], tokenizer, limit, show and part == "train"
        )
        for part in ("train", "held_out")
    )
    return train, test


def _identity(pair: Preference) -> Any:
    """What must not lie in two parts: the prompt, or the pair itself where it has none."""
    return pair.prompt or f"{pair.chosen}\n{pair.rejected}"


def _both_parts(parts: Mapping[str, Any], name: str) -> None:
    for part, rows in parts.items():
        if not rows:
            raise HeelerError(
                f"{name}: no row falls into the part {part!r}: give more rows, another --eval-share, or --eval-data"
            )


def draw_scores(chosen: Sequence[float], rejected: Sequence[float], file: Path, show: bool = True) -> None:
    """Histograms of the scores of chosen and rejected texts, and of the differences within pairs."""
    if not find_spec("matplotlib"):
        say(f"{file.name} was not drawn: it needs matplotlib, pip install 'heeler[plots]'", show)
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (scores, differences) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    low, high = min(*chosen, *rejected), max(*chosen, *rejected)
    edges = [low + (high - low) * i / 40 for i in range(41)]
    scores.hist(chosen, edges, alpha=0.6, label="chosen")
    scores.hist(rejected, edges, alpha=0.6, label="rejected")
    scores.set_xlabel("score, normalised")
    scores.set_ylabel("held-out texts")
    scores.legend()
    gaps = [a - b for a, b in zip(chosen, rejected, strict=True)]
    differences.hist(gaps, 40, color="gray")
    differences.axvline(0, color="black", linewidth=1)
    share = sum(gap > 0 for gap in gaps) / len(gaps)
    differences.set_title(f"{share:.1%} of the pairs in the right order", fontsize=10)
    differences.set_xlabel("chosen minus rejected")
    differences.set_ylabel("held-out pairs")
    figure.savefig(file, dpi=100)
    plt.close(figure)

"""Recipes of several stages: fine-tuning, a reward model, PPO, each in a folder of its own, and one table at the end.

    OUT/data/   what the stages read        OUT/sft/      OUT/reward/     OUT/ppo/      run folders
    OUT/summary.json                        figures of every stage on the same held-out prompts

A stage that is complete is not repeated, and one that was stopped goes on from its last checkpoint, by the same command
with its --out. OUT/recipe.json keeps what the command said, and another command is refused there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from heeler.rollout.engines.draws import GREEDY
from heeler.runtime.progress import say
from heeler.runtime.runs import RunFolder, read_json, write_json
from heeler.train.dialogue import DialogueConfig, build_dialogue_run, resume_dialogue, train_dialogue
from heeler.train.report import figures_table
from heeler.train.reward_run import RewardTask, resume_reward, train_reward
from heeler.train.run import default_out
from heeler.train.sft import SFTConfig, resume_sft, train_sft
from heeler.train.text import TextConfig, TextRun, build_text_run, resume_text, train_text
from heeler.types import HeelerError

BEFORE_CHECKPOINTS = ("config.json", "summary.json", "checkpoints")  # what a run writes before it trains


def claim(folder: str | None, name: str, recipe: Any, **settings: Any) -> Path:
    """The recipe's folder, a new one where none is named; what it was begun with is kept there.

    Args:
        folder: the one that `--out` names.
        name: of the recipe.
        recipe: its options.
        settings: what else decides the run, and may be another in another version.

    Raises:
        HeelerError: the folder belongs to a recipe with other options, or holds something else.
    """
    out = Path(folder or default_out(name))
    options = {key: value for key, value in vars(recipe).items() if key not in ("out", "threads")}
    said = json.loads(json.dumps({"recipe": name, **options, **settings}))  # as it is read again: tuples are lists
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HeelerError(f"cannot create the folder {out}: {error.strerror}; choose another --out") from error
    if {file.name.removesuffix(".partial") for file in out.iterdir()} <= {"recipe.json"}:
        write_json(out / "recipe.json", said)  # no stage began
    if not (out / "recipe.json").exists():
        raise HeelerError(f"{out} holds something else than a recipe's stages: move it away, or choose another --out")
    before = read_json(out / "recipe.json")
    other = [f"{key} {before.get(key)}, not {said.get(key)}" for key in said if before.get(key) != said[key]]
    if other:
        raise HeelerError(f"{out} was begun with {'; '.join(other)}: give the same options, or another --out")
    return out


def write_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """A JSONL file, written once: a recipe that goes on reads what it began with."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_name(file.name + ".partial")
        lines = [json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows]
        aside.write_text("".join(lines), encoding="utf-8")
        aside.rename(file)
    return str(file)


def _state(folder: Path) -> str:
    """Whether a stage is "new", "interrupted" or "complete".

    What a run that was killed before its first checkpoint left is removed: it begins again.
    """
    config, summary = (
        read_json(folder / name) if (folder / name).exists() else {} for name in ("config.json", "summary.json")
    )
    match config.get("verb"):
        case "reward":
            return "complete" if summary else "interrupted"  # it begins again where nothing was kept
        case "sft":
            complete = "updates" in summary  # which it writes at its end only
        case _:
            complete = "exported" in summary and "eval/after" in summary
    if complete and (folder / "policy").is_dir():
        return "complete"
    if RunFolder(folder).last_checkpoint() is not None:
        return "interrupted"
    files = list(folder.iterdir()) if folder.exists() else []
    known = BEFORE_CHECKPOINTS if "verb" in config else ()
    if any(file.name.removesuffix(".partial") not in known for file in files):
        raise HeelerError(f"{folder} exists and is no run that could go on: move it away, or choose another --out")
    for file in files:
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    return "new"


def _run(stage: Callable[[], Any], out: Path) -> None:
    try:
        stage()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; go on with the same command and --out {out}") from None


def _stage(folder: Path, start: Callable[[], Any], go_on: Callable[[], Any], show: bool) -> dict[str, Any]:
    """Start, continue or skip a stage, as its folder says; its summary."""
    match _state(folder):
        case "new":
            _run(start, folder.parent)
        case "interrupted":
            _run(go_on, folder.parent)
        case _:
            say(f"{folder} is complete", show)
    return read_json(folder / "summary.json")


def sft_stage(config: SFTConfig, show: bool = True) -> dict[str, Any]:
    """Fine-tune into `config.out` where that is not done; its summary."""
    folder = Path(str(config.out))
    return _stage(folder, lambda: train_sft(config, show=show), lambda: resume_sft(folder, show=show), show)


def reward_stage(task: RewardTask, show: bool = True) -> dict[str, Any]:
    """Train the reward model of `task.out` where that is not done; its summary."""
    folder = Path(str(task.out))
    return _stage(folder, lambda: train_reward(task, show=show), lambda: resume_reward(folder, show=show), show)


def ppo_stage(config: TextConfig, show: bool = True) -> dict[str, Any]:
    """PPO into `config.out` where that is not done; its summary."""
    folder = Path(str(config.out))
    if isinstance(config, DialogueConfig):
        begin, go_on = partial(train_dialogue, config), partial(resume_dialogue, folder)
    else:
        begin, go_on = partial(train_text, config), partial(resume_text, folder)
    return _stage(folder, lambda: begin(show=show), lambda: go_on(show=show), show)


def build(config: TextConfig) -> TextRun:
    """The run that a config describes, of texts or of dialogues."""
    return build_dialogue_run(config) if isinstance(config, DialogueConfig) else build_text_run(config)


def figures_of(model: str, config: TextConfig, file: Path, show: bool = True) -> dict[str, float]:
    """Held-out figures of a model on the prompts, rewards and judges of `config`, kept in `file`.

    Without those that compare it with a reference, which would be itself.
    """
    if not file.exists():
        say(f"evaluating {model}", show)
        run = build(replace(config, model=model, prompts=""))
        figures = run.evaluate(show=show).figures
        write_json(file, {key: value for key, value in figures.items() if key not in ("kl/ref", "perplexity")})
    return read_json(file)


def greedy_figures(model: str, config: TextConfig, file: Path, show: bool = True) -> dict[str, float]:
    """Mean reward and judges of each held-out prompt's most likely completion, kept in `file`.

    Draws at temperature 1 also gain when a policy only grows surer of what it preferred before; these do not.
    """
    if not file.exists():
        say(f"evaluating {model}, the most likely tokens", show)
        sampling = replace(config.sampling, temperature=GREEDY)
        run = build(replace(config, model=model, prompts="", sampling=sampling))
        assert run.eval_prompts is not None
        run.publish()
        rollout = run.rollout(run.eval_prompts, [0] * len(run.eval_prompts))
        samples = run.samples_of(rollout)
        output = run.judge(rollout)
        figures = {"reward/greedy": float(output.scores.mean())}
        figures |= {f"{k}/greedy": float(values.float().mean()) for k, values in run.episode_figures(rollout).items()}
        figures |= {f"reward/{name}/greedy": float(values.mean()) for name, values in output.components.items()}
        figures |= {f"{name}/greedy": float(judge(samples).scores.mean()) for name, judge in run.judges.items()}
        write_json(file, figures)
    return read_json(file)


def train_chain(
    out: Path, sft: SFTConfig, task: RewardTask, config: TextConfig, keep: Sequence[str], show: bool, **more: Any
) -> Path:
    """Fine-tuning, a reward model, PPO, and the figures of base model, fine-tuned and trained policy.

    Args:
        out: the recipe's folder.
        sft: of the base model.
        task: the reward model's.
        config: PPO's, from the fine-tuned policy with that reward.
        keep: figures of the table.
        show: print progress.
        more: written into summary.json as it is.
    """
    say("1. fine-tuning", show)
    sft_stage(sft, show)
    say("2. a reward model", show)
    reward = reward_stage(task, show)
    say("3. PPO", show)
    base = figures_of(sft.model, config, out / "base.json", show)
    ppo = ppo_stage(config, show)
    stages = {"base": base, "SFT": ppo["eval/before"], "SFT+PPO": ppo["eval/after"]}
    finish(out, stages, keep, {"reward_model": reward["eval/after"], **more})
    return out


def finish(
    out: Path, stages: Mapping[str, Mapping[str, float]], keep: Sequence[str], more: Mapping[str, Any], look: str = ""
) -> None:
    """Write OUT/summary.json, print the table of the stages and what to `look` at next."""
    write_json(out / "summary.json", {"stages": stages, **more})
    shown = {title: {name: figures[name] for name in keep if name in figures} for title, figures in stages.items()}
    print("\nThe same held-out prompts, drawn at temperature 1 where the figure does not say greedy:")
    print(figures_table(shown))
    print(f"{out}/summary.json has all figures; {look or f'heeler sample {out}/ppo --prompt ...'}")

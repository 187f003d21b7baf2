"""PPO for language models: assembling policy, engine, prompts and rewards into a run.

from heeler import TextConfig, train_text
run = train_text(TextConfig(model="path", updates=50), prompts=["Once upon"], reward=my_reward)
print(run.sample("Once upon"))
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from heeler.data.prompts import PromptSet, load_prompts
from heeler.policies import loading
from heeler.policies.language_model import Critic, Full, LanguageModelPolicy, LoRA, TopLayers, Trainable, ValueHead
from heeler.ppo.advantages import AdvantageConfig
from heeler.ppo.kl import FixedKL, KLConfig, KLEstimator
from heeler.ppo.schedules import Schedule
from heeler.ppo.shaping import Truncation
from heeler.ppo.update import PPOConfig
from heeler.rewards.classifier import ClassifierReward
from heeler.rewards.functions import FunctionReward, RewardFunction, load_function
from heeler.rollout.engines.hf import HFEngine
from heeler.rollout.engines.native import NativeEngine
from heeler.rollout.text import TextCollector
from heeler.runtime import machine
from heeler.runtime.configs import from_json, to_json
from heeler.runtime.progress import progress, say
from heeler.runtime.reduce import LocalReduce
from heeler.runtime.runs import RunFolder
from heeler.train.evaluate import Evaluation, evaluate_text
from heeler.train.ppo import TrainState, UpdateReport, train_loop
from heeler.train.scoring import make_score
from heeler.types import Engine, HeelerError, Reward, Sampling


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """A PPO run on a language model. Batch sizes are global.

    Attributes:
        model: folder or hub id of any causal LM that transformers loads.
        prompts: JSONL file with a "prompt" column (a string or chat messages); other columns reach the reward.
        reward: "module:function", or the folder of a sequence classifier.
        eval_prompts: JSONL file of held-out prompts for the figures before and after.
        judges: "name=module:function" scorers that are only reported, never trained on.
        out: the run folder; runs/NAME where None.
        seed: of every draw.
        updates: PPO updates.
        prompts_per_update: prompts in one update.
        samples_per_prompt: completions of each.
        sampling: length cap and temperature.
        trainable: which weights are trained.
        critic: where values come from.
        kl: the penalty toward the reference.
        kl_estimator: of that penalty; k1 is the right one in a reward.
        truncation: what a completion cut at the length cap means.
        loss_weighting: every token counts the same, or every sequence.
        lr, critic_lr: peak learning rates of AdamW.
        lr_schedule: their course over the run.
        adam_betas: of AdamW.
        weight_decay: of AdamW.
        advantage: GAE.
        ppo: the update.
        engine: "native", or "hf" for transformers' generate.
        engine_rows: completions sampled at once.
        reuse_trunk_states: let the engine keep the frozen trunk's hidden states for the trainer.
        precision: "auto" measures; fp32 or bf16.
        device: "auto" takes a GPU where there is one.
        threads: CPU threads; None takes all.
        eval_every: evaluate each N updates and keep the best policy; 0 evaluates before and after only.
        checkpoint_every: updates between checkpoints.
        samples_logged: samples of each update written to samples.jsonl.
    """

    model: str
    prompts: str = ""
    reward: str = ""
    eval_prompts: str | None = None
    judges: tuple[str, ...] = ()
    out: str | None = None
    seed: int = 0
    updates: int = 100
    prompts_per_update: int = 64
    samples_per_prompt: int = 1
    sampling: Sampling = Sampling()
    trainable: Full | TopLayers | Annotated[LoRA, tyro.conf.subcommand("lora")] = TopLayers()
    critic: Critic = ValueHead()
    kl: KLConfig = FixedKL()
    kl_estimator: KLEstimator = "k1"
    truncation: Truncation = "terminal"
    loss_weighting: Literal["token", "sequence"] = "token"
    lr: float = 1e-4
    critic_lr: float = 1e-3
    lr_schedule: Schedule = Schedule()
    adam_betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    advantage: AdvantageConfig = AdvantageConfig()
    ppo: PPOConfig = PPOConfig(epochs=2, minibatches=2)
    engine: Literal["native", "hf"] = "native"
    engine_rows: int = 128
    reuse_trunk_states: bool = True
    precision: machine.Precision = "auto"
    device: str = "auto"
    threads: int | None = None
    eval_every: int = 0
    checkpoint_every: int = 20
    samples_logged: int = 4


@dataclass
class TextRun:
    """An assembled run: everything that training, evaluation and sampling share."""

    config: TextConfig
    tokenizer: Any
    policy: LanguageModelPolicy
    engine: Engine
    reward: Reward
    judges: Mapping[str, Reward]
    prompts: PromptSet | None
    eval_prompts: PromptSet | None
    state: TrainState
    folder: RunFolder | None
    notes: list[str]
    summary: dict[str, Any]

    def publish(self) -> None:
        self.engine.begin()
        self.engine.load(self.policy.published())
        self.engine.commit(self.state.step)

    def evaluate(self, show: bool = False) -> Evaluation:
        """Figures on the evaluation prompts with the policy as it is now; `show` draws a progress bar."""
        if self.eval_prompts is None:
            raise HeelerError("the run has no evaluation prompts: give a JSONL file of prompts")
        self.publish()
        total = len(self.eval_prompts) * self.config.sampling.max_new_tokens
        bar = progress(total, "evaluating", "token", show=show)
        if isinstance(self.engine, NativeEngine):
            self.engine.on_progress = bar.update
        try:
            return evaluate_text(
                self.policy, self.engine, self.tokenizer, self.eval_prompts, self.reward, self.judges,
                self.config.sampling, seed=self.config.seed, token_budget=self.config.ppo.token_budget,
            )  # fmt: skip
        finally:
            bar.close()
            if isinstance(self.engine, NativeEngine):
                self.engine.on_progress = None

    def sample(self, *prompts: Any, seed: int = 0) -> list[str]:
        """Completions of strings or chats by the policy as it is now."""
        from heeler.rollout.engines.draws import draw_seed
        from heeler.rollout.text import sample_rollout

        self.publish()
        loaded = load_prompts(list(prompts), self.tokenizer, max_tokens=None)
        indices = list(range(len(loaded)))
        seeds = [draw_seed(seed, i) for i in indices]
        rollout = sample_rollout(
            self.engine, self.tokenizer, loaded, indices, [0] * len(indices), seeds, self.config.sampling,
            self.policy.device,
        )  # fmt: skip
        return list(rollout.completions)


def load_reward(spec: str, device: str = "cpu") -> Reward:
    """The reward that `spec` names: the folder of a classifier, or module:function."""
    if not spec:
        raise HeelerError("no reward was given: --reward module:function, or the folder of a sequence classifier")
    if (Path(spec) / "config.json").is_file():
        return ClassifierReward(spec, device=device)
    return FunctionReward(load_function(spec), spec)


def load_judges(specs: Sequence[str]) -> dict[str, Reward]:
    judges: dict[str, Reward] = {}
    for spec in specs:
        name, equals, function = spec.partition("=")
        if not equals:
            name, function = spec.rpartition(":")[2], spec
        judges[name] = load_reward(function)
    return judges


def build_text_run(
    config: TextConfig,
    *,
    prompts: Sequence[Any] | None = None,
    eval_prompts: Sequence[Any] | None = None,
    reward: RewardFunction | Reward | None = None,
) -> TextRun:
    """Load everything a run needs; nothing is written yet.

    Args:
        config: the run.
        prompts, eval_prompts: in place of the config's files.
        reward: a function or a `Reward`, in place of the config's.
    """
    machine.keep_freed_memory()
    machine.set_threads(config.threads)
    machine.seed_everything(config.seed)
    device = machine.choose_device(config.device)
    scorer: Reward
    if reward is None:
        scorer = load_reward(config.reward, device)
    elif callable(reward) and hasattr(reward, "__name__"):
        scorer = FunctionReward(reward, getattr(reward, "__name__", "reward"))  # pyright: ignore
    else:
        scorer = reward  # pyright: ignore
    judges = load_judges(config.judges)
    tokenizer = loading.load_tokenizer(config.model)

    model = loading.load_causal_lm(config.model).to(device)
    precision, why = machine.choose_precision(config.precision, device)
    context = loading.context_length(model)
    room = None if context is None else context - config.sampling.max_new_tokens
    source = prompts if prompts is not None else config.prompts
    loaded = load_prompts(source, tokenizer, max_tokens=room) if len(source) else None
    eval_source = eval_prompts if eval_prompts is not None else config.eval_prompts
    loaded_eval = load_prompts(eval_source, tokenizer, max_tokens=room) if eval_source else None

    eos_ids = loading.end_of_sequence_ids(model, tokenizer)
    policy = LanguageModelPolicy(
        model,
        trainable=config.trainable,
        critic=config.critic,
        temperature=config.sampling.temperature,
        precision=precision,
        entropy_gradient=config.ppo.entropy_coef != 0,
        seed=config.seed,
    )
    keep_states = config.reuse_trunk_states and policy.trunk is not None and config.truncation != "bootstrap"
    engine: Engine
    if config.engine == "hf":
        engine = HFEngine(policy.engine_model, eos_ids=eos_ids, max_rows=config.engine_rows)
    else:
        engine = NativeEngine(
            policy.engine_model,
            eos_ids=eos_ids,
            max_rows=config.engine_rows,
            trunk_layers=policy.num_trunk_layers if keep_states else None,
        )
    if precision == "bf16":
        config = replace(config, ppo=replace(config.ppo, ratio_tolerance=max(config.ppo.ratio_tolerance, 0.05)))
    groups = policy.parameter_groups()
    rates = {"policy": config.lr, "critic": config.critic_lr}
    for group in groups:
        group["lr"] = group["base_lr"] = rates[group["name"]]
    optimizer = torch.optim.AdamW(groups, betas=config.adam_betas, weight_decay=config.weight_decay)
    state = TrainState(
        policy=policy,
        optimizer=optimizer,
        generator=torch.Generator().manual_seed(config.seed),
        kl_coef=config.kl.coef,
    )
    trained = sum(p.numel() for p in groups[0]["params"])
    notes = [
        f"{device}, {torch.get_num_threads()} threads, {why}",
        f"training {trained / 1e6:.1f}M of {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M weights"
        f" ({_describe(config.trainable)}), ends of sequence {eos_ids or 'none'}",
        *policy.notes,
    ]
    return TextRun(
        config=config, tokenizer=tokenizer, policy=policy, engine=engine, reward=scorer, judges=judges,
        prompts=loaded, eval_prompts=loaded_eval, state=state, folder=None, notes=notes, summary={},
    )  # fmt: skip


def _describe(trainable: Trainable) -> str:
    match trainable:
        case Full():
            return "all"
        case TopLayers(layers=layers):
            return f"top {layers} layers"
        case LoRA(rank=rank, layers=layers):
            return f"LoRA rank {rank} on {'all' if layers is None else f'the top {layers}'} layers"


# the run ------------------------------------------------------------------------------------------------------


def train_text(
    config: TextConfig,
    *,
    prompts: Sequence[Any] | None = None,
    eval_prompts: Sequence[Any] | None = None,
    reward: RewardFunction | Reward | None = None,
    on_update: Callable[[UpdateReport], None] | None = None,
    extra: Mapping[str, Any] | None = None,
    show: bool = True,
) -> TextRun:
    """Train, and leave a run folder.

    Args:
        config: the run.
        prompts, eval_prompts: lists, in place of the config's files.
        reward: a function in place of the config's.
        on_update: called after each update.
        extra: written into summary.json as it is (a recipe's own figures).
        show: print progress.
    """
    folder = RunFolder.create(config.out or default_out("lm"))
    try:
        run = build_text_run(config, prompts=prompts, eval_prompts=eval_prompts, reward=reward)
        if run.prompts is None:
            raise HeelerError('no prompts were given: --prompts FILE.jsonl with a "prompt" column')
    except BaseException:
        if not any(folder.path.iterdir()):
            folder.path.rmdir()
        raise
    run.folder = folder
    folder.write_config({
        "verb": "ppo lm", "config": to_json(config),
        "resolved": {"precision": run.policy.precision, "threads": torch.get_num_threads(), "notes": run.notes,
                     "torch": torch.__version__, "device": str(run.policy.device)},
    })  # fmt: skip
    run.summary.update(extra or {})
    folder.write_summary(run.summary)
    _save(run, keep_best=None)  # from here on the run can be resumed
    return _continue(run, on_update, show)


def resume_text(
    path: str | Path,
    *,
    prompts: Sequence[Any] | None = None,
    eval_prompts: Sequence[Any] | None = None,
    reward: RewardFunction | Reward | None = None,
    on_update: Callable[[UpdateReport], None] | None = None,
    updates: int | None = None,
    show: bool = True,
) -> TextRun:
    """Continue a run from its last checkpoint, to its own number of updates or to `updates`."""
    run = load_text_run(path, prompts=prompts, eval_prompts=eval_prompts, reward=reward, updates=updates)
    assert run.folder is not None
    if run.state.step >= run.config.updates:
        raise HeelerError(
            f"{path} is complete: it has done {run.state.step} updates; give a larger --updates N to go on"
        )
    if run.prompts is None:
        raise HeelerError(f"{path} was trained on prompts given in Python: resume it there, with the same prompts")
    run.folder.write_config({**run.folder.read_config(), "config": to_json(run.config)})
    run.folder.forget_after(run.state.step)
    say(f"continuing {path} after update {run.state.step}", show)
    return _continue(run, on_update, show)


def load_text_run(
    path: str | Path,
    *,
    prompts: Sequence[Any] | None = None,
    eval_prompts: Sequence[Any] | None = None,
    reward: RewardFunction | Reward | None = None,
    updates: int | None = None,
) -> TextRun:
    """Assemble a run from its folder and put it into the state of its last checkpoint."""
    folder = RunFolder.open(path)
    saved = folder.read_config()
    config: TextConfig = from_json(TextConfig, saved["config"], str(folder.path / "config.json"))
    resolved = saved["resolved"]
    config = replace(
        config,
        out=str(path),
        precision=resolved["precision"],
        threads=resolved["threads"],
        updates=updates or config.updates,
    )
    step = folder.last_checkpoint()
    if step is None:
        raise HeelerError(f"{path} has no checkpoint to continue from")
    run = build_text_run(config, prompts=prompts, eval_prompts=eval_prompts, reward=reward)
    run.folder = folder
    checkpoint = folder.load_checkpoint(step)
    run.policy.load_state_dict(checkpoint["weights"])
    run.state.optimizer.load_state_dict(checkpoint["optimizer"])
    run.state.generator.set_state(checkpoint["generator"])
    machine.restore_random_states(checkpoint["random"])
    for name in ("step", "kl_coef", "decisions", "episodes", "seconds"):
        setattr(run.state, name, checkpoint["state"][name])
    if (folder.path / "summary.json").exists():
        from heeler.runtime.runs import read_json

        run.summary = read_json(folder.path / "summary.json")
    return run


def _save(run: TextRun, keep_best: int | None) -> None:
    assert run.folder is not None
    state = run.state
    run.folder.save_checkpoint(
        state.step,
        {
            "weights": run.policy.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            "generator": state.generator.get_state(),
            "random": machine.random_states(),
            "state": {name: getattr(state, name) for name in ("step", "kl_coef", "decisions", "episodes", "seconds")},
        },
        keep=[] if keep_best is None else [keep_best],
    )


def _continue(run: TextRun, on_update: Callable[[UpdateReport], None] | None, show: bool) -> TextRun:
    """Train from the run's state to its end, evaluate and export."""
    assert run.folder is not None
    try:
        return _train_and_export(run, on_update, show)
    except KeyboardInterrupt as interrupt:
        if interrupt.args:
            raise
        raise KeyboardInterrupt(f"interrupted; continue with: heeler resume {run.folder.path}") from None


def _train_and_export(run: TextRun, on_update: Callable[[UpdateReport], None] | None, show: bool) -> TextRun:
    config, state, folder, policy = run.config, run.state, run.folder, run.policy
    assert folder is not None and run.prompts is not None
    collector = TextCollector(
        run.engine, run.tokenizer, run.prompts, config.sampling,
        prompts_per_update=config.prompts_per_update, samples_per_prompt=config.samples_per_prompt,
        seed=config.seed, reduce=LocalReduce(), device=policy.device,
    )  # fmt: skip
    for note in run.notes:
        say(note, show)
    if state.step == 0 and run.eval_prompts is not None:
        say("evaluating before training", show)
        before = run.evaluate(show)
        run.summary["eval/before"] = before.figures
        run.summary["eval/examples"] = [
            {"prompt": p, "before": c, "reward/before": r}
            for p, c, r in zip(before.prompts[:8], before.completions, before.rewards, strict=False)
        ]
        folder.write_summary(run.summary)
    bar = progress(config.updates, "PPO", "update", done=state.step, show=show)
    started = time.perf_counter()
    with _interruptible() as interrupted:

        def after_update(report: UpdateReport) -> bool:
            evaluated = run.eval_prompts is not None and config.eval_every and state.step % config.eval_every == 0
            if evaluated:
                report = replace(report, metrics=report.metrics | _keep_if_best(run, show))
            folder.log(report.metrics, _samples(report, config.samples_logged))
            bar.update(1)
            say(describe_update(report.metrics, config.updates), show)
            if on_update is not None:
                on_update(report)
            best = run.summary.get("best", {}).get("step")
            if state.step % config.checkpoint_every == 0 or interrupted.is_set() or state.step == config.updates:
                _save(run, keep_best=best)
            return not interrupted.is_set()

        try:
            train_loop(state, collector, make_score(run), config, LocalReduce(), after_update)
        except HeelerError as error:
            at = folder.last_checkpoint()
            raise type(error)(
                f"{error} [update {state.step + 1}; {folder.path} holds update {at}, continue it with:"
                f" heeler resume {folder.path}]"
            ) from error
        finally:
            bar.close()
            folder.close()
            run.summary["seconds/ppo"] = run.summary.get("seconds/ppo", 0.0) + time.perf_counter() - started
            run.summary["peak_memory_gib"] = round(machine.peak_memory_gib(), 2)
            run.summary["updates"] = state.step
            run.summary |= {k: v for k, v in (folder.metrics() or [{}])[-1].items() if k != "step"}
            folder.write_summary(run.summary)
    if interrupted.is_set() and state.step < config.updates:
        raise KeyboardInterrupt(f"stopped after update {state.step}; continue with: heeler resume {folder.path}")
    export_policy(run, folder.path)
    if run.eval_prompts is not None:
        say("evaluating after training", show)
        after = run.evaluate(show)
        run.summary["eval/after"] = after.figures
        for example, text, value in zip(
            run.summary.get("eval/examples", []), after.completions, after.rewards, strict=False
        ):
            example |= {"after": text, "reward/after": value}
    run.summary["peak_memory_gib"] = round(machine.peak_memory_gib(), 2)
    folder.write_summary(run.summary)
    return run


def _keep_if_best(run: TextRun, show: bool) -> dict[str, float]:
    """Evaluate; keep policy and checkpoint where the held-out reward is the best so far. Returns the figures."""
    assert run.folder is not None
    figures = run.evaluate(show).figures
    say(f"  held-out reward {figures['reward']:.3f}, KL {figures['kl/ref']:.2f} nats", show)
    best = run.summary.get("best")
    if best is None or figures["reward"] > best["reward"]:
        run.summary["best"] = {"step": run.state.step, **figures}
        export_policy(run, run.folder.path / "best")
        _save(run, keep_best=run.state.step)
        run.folder.write_summary(run.summary)
    return {f"eval/{name}": value for name, value in figures.items()}


def export_policy(run: TextRun, folder: Path) -> None:
    """`policy/`, a folder that plain transformers loads (adapters merged, and beside it), and `critic/`."""
    from safetensors.torch import save_file

    run.policy.export_model().save_pretrained(folder / "policy")
    run.tokenizer.save_pretrained(folder / "policy")
    if run.policy.peft_model is not None:
        run.policy.peft_model.save_pretrained(folder / "policy" / "adapter")
    (folder / "critic").mkdir(exist_ok=True)
    save_file(run.policy.critic_state(), folder / "critic" / "critic.safetensors")


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
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


def describe_update(metrics: Mapping[str, float], total: int) -> str:
    reward = metrics.get("reward/probability", metrics["reward/mean"])
    return (
        f"{int(metrics['step']):4d}/{total}  reward {reward:6.3f}  KL {metrics['kl/ref']:5.2f}"
        f"  clipped {metrics['policy/clip_fraction']:4.0%}  explained {metrics['value/explained_variance']:5.2f}"
        f"  length {metrics['completion/length']:5.1f}  {metrics['decisions_per_second']:5.0f} tokens/s"
    )


def _samples(report: UpdateReport, count: int) -> list[dict[str, Any]]:
    rollout = report.scored.rollout
    return [
        {
            "update": int(report.metrics["step"]),
            "prompt": rollout.prompts[i],
            "completion": rollout.completions[i],
            "reward": float(report.scored.scores[i]),
        }
        for i in range(min(count, len(rollout.prompts)))
    ]


def default_out(name: str) -> str:
    """runs/NAME, with a number where that exists."""
    base, number = Path("runs") / name, 1
    path = base
    while path.exists():
        number += 1
        path = base.with_name(f"{name}-{number}")
    return str(path)

"""Supervised fine-tuning: maximum likelihood of completions, so that PPO starts from a model that knows the task.

    loss = - sum over target tokens t of log pi(y_t | x, y_<t) / number of target tokens in the optimiser step

The targets are packed like PPO's decisions, so the log-probabilities come from the same code as PPO's
(`LanguageModelPolicy.evaluate`): only at the targets, in chunks, with the frozen trunk computed without gradient.
The result is a run folder whose `policy/` starts PPO: `heeler ppo lm --model runs/sft`.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor

from heeler.data.examples import Example, load_examples
from heeler.policies import loading
from heeler.policies.inputs import TokenInputs
from heeler.policies.language_model import Full, LanguageModelPolicy, LoRA, TopLayers, ValueHead
from heeler.policies.seq2seq import Seq2SeqPolicy
from heeler.ppo.minibatches import budgeted_microbatches
from heeler.ppo.schedules import Schedule
from heeler.rollout.engines.draws import draw_seed
from heeler.rollout.engines.native import native_engine
from heeler.rollout.text import decode
from heeler.runtime import machine
from heeler.runtime.configs import from_json, to_json
from heeler.runtime.passes import PassBudget, pass_budget
from heeler.runtime.progress import progress, say
from heeler.runtime.runs import NotWritten, RunFolder
from heeler.train.optimizers import AdamW, check_installed, make_adamw
from heeler.train.run import at_least, default_out, interruptible, new_folder
from heeler.types import CheckFailed, Completion, HeelerError, Request, Sampling

PACKED_ROW = 4096
BEGINNING = 8  # tokens of a text that are its prompt in samples.jsonl, of a short one half


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """Supervised fine-tuning of a causal or an encoder-decoder language model.

    Attributes:
        model: folder, run folder or hub id of any such model that transformers loads.
        data: a file (JSONL, CSV, Parquet) or a datasets id with prompt/completion, messages or text columns.
        eval_data: held-out examples; where None, `eval_share` of the data is held out.
        eval_share: the share that is held out where there is no `eval_data`; 0 holds out nothing.
        out: the run folder; runs/sft where None.
        seed: of the order.
        epochs: passes over the data.
        updates: optimiser steps; as many as the epochs need where 0.
        examples_per_update: examples of one optimiser step.
        max_tokens: the most tokens an example may have (with an encoder-decoder model: its prompt, and its completion);
            the model's context where None.
        too_long: "error" refuses longer examples, "drop" leaves them out and says how many.
        trainable: which weights are trained.
        lr: peak learning rate of AdamW.
        lr_schedule: its course; warm-up counts updates.
        optimizer: AdamW with its moments in 32 bits, or in 8 (adamw8bit, by bitsandbytes): 6 bytes less for a trained
            weight outside embeddings and small tensors.
        adam_betas: of AdamW.
        weight_decay: of AdamW.
        max_grad_norm: gradients are scaled down to it.
        token_budget: tokens of one forward pass, padding included; None takes 1,536 on a CPU, where larger passes gain
            no speed, and 8,192 elsewhere. With `pack` it is the width of a row too, and None takes 4,096.
        pack: examples share rows, blind to each other, instead of being padded to similar lengths: for GPUs; on a
            CPU the mask costs more than the padding. Not with encoder-decoder models.
        eval_every: evaluate each N updates and keep the weights with the lowest held-out loss; 0 evaluates before
            and after only.
        checkpoint_every: updates between checkpoints.
        sample_prompts: held-out prompts, or beginnings of held-out texts, that are completed after training, for
            samples.jsonl.
        sample_tokens: length cap of these completions; fewer where the model's context ends before.
        activation_checkpointing: layers keep only their input for the backward pass and are computed again in it: less
            memory, a forward pass more.
        precision: "auto" measures; fp32 or bf16.
        device: "auto" takes a GPU where there is one.
        threads: CPU threads; None takes one for each core that the process may use.
    """

    model: str
    data: str = ""
    eval_data: str | None = None
    eval_share: float = 0.05
    out: str | None = None
    seed: int = 0
    epochs: float = 1.0
    updates: int = 0
    examples_per_update: int = 32
    max_tokens: int | None = None
    too_long: Literal["error", "drop"] = "error"
    trainable: Full | TopLayers | Annotated[LoRA, tyro.conf.subcommand("lora")] = Full()
    lr: float = 2e-5
    lr_schedule: Schedule = Schedule(shape="cosine", warmup=5, end=0.1)
    optimizer: AdamW = "adamw"
    adam_betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    token_budget: int | None = None
    pack: bool = False
    eval_every: int = 0
    checkpoint_every: int = 200
    sample_prompts: int = 4
    sample_tokens: int = 48
    activation_checkpointing: bool = False
    precision: machine.Precision = "auto"
    device: str = "auto"
    threads: int | None = None


@dataclass(kw_only=True)
class SFTRun:
    """An assembled run of supervised fine-tuning.

    Attributes:
        train, held_out: tokenised examples.
        step: optimiser steps done.
        passes: tokens of one forward pass; with `--pack` those of a row, whose mask grows with their square.
        best: step, held-out loss and weights of the best evaluation so far; None before the first.
    """

    config: SFTConfig
    tokenizer: Any
    policy: LanguageModelPolicy
    optimizer: torch.optim.Optimizer
    train: Sequence[Example]
    held_out: Sequence[Example]
    eos_ids: list[int]
    notes: list[str]
    passes: PassBudget
    folder: RunFolder | None = None
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best: dict[str, Any] | None = None
    summary: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def total(self) -> int:
        """Optimiser steps of the whole run."""
        config = self.config
        return config.updates or max(1, round(config.epochs * len(self.train) / config.examples_per_update))

    def batch(self, step: int) -> list[Example]:
        """The examples of optimiser step `step`: a walk through seeded shuffles, a pure function of the step."""
        n, size = len(self.train), self.config.examples_per_update
        chosen: list[int] = []
        while len(chosen) < size:
            epoch, start = divmod(step * size + len(chosen), n)
            order = np.random.default_rng(draw_seed(self.config.seed, 0x5F7, epoch)).permutation(n)
            chosen += order[start : start + size - len(chosen)].tolist()
        return [self.train[i] for i in chosen]

    def weights(self) -> dict[str, Tensor]:
        """The trained weights by name."""
        state = self.policy.state_dict()
        return {name: tensor.clone() for name, tensor in state.items() if name.startswith("policy.")}

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        self.policy.load_state_dict({**self.policy.state_dict(), **weights})


def as_inputs(examples: Sequence[Example], device: torch.device) -> TokenInputs:
    """Examples as sequences whose targets are decisions."""
    return TokenInputs(
        tokens=torch.tensor([token for e in examples for token in e.tokens], device=device),
        lengths=torch.tensor([len(e.tokens) for e in examples], device=device),
        is_decision=torch.tensor([t and i > 0 for e in examples for i, t in enumerate(e.is_target)], device=device),
    )


def _prompt_of(example: Example) -> tuple[int, ...]:
    """The tokens before the first target; all of them where there are none before it."""
    return tuple(example.tokens[: example.is_target.index(True)]) or tuple(example.tokens)


def _hold_out(examples: list[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """`(train, held out)`: whole prompts, so that no completion of a held-out prompt is trained on."""
    of_prompt: dict[tuple[int, ...], list[Example]] = {}
    for example in examples:
        of_prompt.setdefault(_prompt_of(example), []).append(example)
    groups = list(of_prompt.values())
    train: list[Example] = []
    held_out: list[Example] = []
    for i in np.random.default_rng(draw_seed(seed, 0xE7A)).permutation(len(groups)).tolist():
        (held_out if len(held_out) < round(share * len(examples)) else train).extend(groups[i])
    if not train:
        raise HeelerError(
            f"{len(examples)} examples of {len(groups)} prompts are too few to hold out {share:.0%} of them: give more,"
            " or --eval-share 0"
        )
    return train, held_out


def build_sft_run(
    config: SFTConfig, *, data: Sequence[Any] | None = None, eval_data: Sequence[Any] | None = None
) -> SFTRun:
    """Load model and examples; nothing is written yet."""
    at_least(
        {
            "--epochs": (config.epochs, 0),
            "--updates": (config.updates, 0),
            "--examples-per-update": (config.examples_per_update, 1),
            "--lr": (config.lr, 0),
            "--eval-every": (config.eval_every, 0),
            "--checkpoint-every": (config.checkpoint_every, 1),
            "--sample-prompts": (config.sample_prompts, 0),
            "--sample-tokens": (config.sample_tokens, 0),
        }
    )
    check_installed(config.optimizer)
    machine.keep_freed_memory()
    machine.set_threads(config.threads)
    machine.seed_everything(config.seed)
    device = machine.choose_device(config.device)
    if not 0 <= config.eval_share < 1:
        raise HeelerError(f"--eval-share is {config.eval_share}: it must be at least 0 and below 1")
    source = data if data is not None else config.data
    if not source:
        raise HeelerError("no examples were given: --data FILE (JSONL, CSV, Parquet) or a datasets id")
    tokenizer = loading.load_tokenizer(config.model)
    model = loading.load_language_model(config.model)
    seq2seq = model.config.is_encoder_decoder
    if seq2seq and config.pack:
        raise HeelerError("sequences of an encoder-decoder model cannot share rows: leave --pack off")
    contexts = loading.seq2seq_lengths(model) if seq2seq else (loading.context_length(model),)
    limit = min((x for x in (config.max_tokens, *contexts) if x is not None), default=None)

    options: dict[str, Any] = {"max_tokens": limit, "too_long": config.too_long, "seq2seq": seq2seq}
    train = load_examples(source, tokenizer, name=config.data or "the examples", **options)
    held_source = eval_data if eval_data is not None else config.eval_data
    if held_source:
        name = config.eval_data or "the held-out examples"
        held_out = load_examples(held_source, tokenizer, name=name, **options)
        both = {_prompt_of(e) for e in train} & {_prompt_of(e) for e in held_out}
        if both:
            raise HeelerError(
                f"{name}: {len(both)} prompts are among those that are trained on too, for instance"
                f" {tokenizer.decode(min(both))[:80]!r}: take them out of one of the two"
            )
    else:
        train, held_out = _hold_out(train, config.eval_share, config.seed)
    precision, why = machine.choose_precision(config.precision, device)
    policy = (Seq2SeqPolicy if seq2seq else LanguageModelPolicy)(
        model,
        trainable=config.trainable,
        critic=ValueHead(),
        precision=precision,
        seed=config.seed,
        share_prompts=False,
        device=device,
    )
    if config.activation_checkpointing:
        policy.checkpoint_activations()
    group = policy.parameter_groups()[0]
    optimizer = make_adamw(
        config.optimizer, [{"params": group["params"], "lr": config.lr}], policy.networks(), device=device,
        betas=config.adam_betas, weight_decay=config.weight_decay,
    )  # fmt: skip
    tokens = (
        PACKED_ROW if config.pack and config.token_budget is None else pass_budget(config.token_budget, policy.device)
    )
    passes = PassBudget(tokens, "--token-budget")
    targets = sum(sum(e.is_target) for e in train)
    notes = [
        f"{device}, {machine.say_threads()}, {why}",
        f"{len(train):,} examples with {targets:,} target tokens, {len(held_out):,} held out",
        *policy.notes,
    ]
    return SFTRun(
        config=config, tokenizer=tokenizer, policy=policy, optimizer=optimizer, train=train, held_out=held_out,
        eos_ids=loading.end_of_sequence_ids(model, tokenizer), notes=notes, passes=passes,
    )  # fmt: skip


def sft_gradients(
    policy: LanguageModelPolicy, inputs: TokenInputs, passes: PassBudget, pack: bool
) -> tuple[float, int]:
    """The gradient of the mean negative log-likelihood (nats a target token); returns it and the target count.

    The denominator belongs to the whole batch, so micro-batching does not change the gradient.
    """
    count = int(inputs.is_decision.sum())

    def run(parts: Sequence[Tensor]) -> float:
        policy.model.zero_grad(set_to_none=True)
        total = 0.0
        for items in parts:
            part = inputs.select(items.to(inputs.lengths.device))
            loss = -policy.evaluate(part, passes.tokens if pack else None).logprobs.sum() / count
            if math.isfinite(loss.item()):
                loss.backward()
            total += loss.item()
        return total

    return passes.fit(partial(budgeted_microbatches, torch.arange(len(inputs.lengths)), inputs.costs.cpu()), run), count


@torch.no_grad()
def held_out_figures(policy: LanguageModelPolicy, examples: Sequence[Example], passes: PassBudget) -> dict[str, float]:
    """`loss` (nats a target token), `perplexity`, and `tokens` it was measured on."""
    inputs = as_inputs(examples, policy.device)

    def read(parts: Sequence[Tensor]) -> tuple[float, int]:
        total, count = 0.0, 0
        for items in parts:
            logprobs = policy.evaluate(inputs.select(items.to(policy.device))).logprobs
            total, count = total - float(logprobs.double().sum()), count + len(logprobs)
        return total, count

    total, count = passes.fit(partial(budgeted_microbatches, torch.arange(len(examples)), inputs.costs.cpu()), read)
    loss = total / count
    return {"loss": loss, "perplexity": math.exp(min(loss, 50.0)), "tokens": float(count)}


def train_sft(
    config: SFTConfig,
    *,
    data: Sequence[Any] | None = None,
    eval_data: Sequence[Any] | None = None,
    on_update: Callable[[dict[str, float]], None] | None = None,
    extra: Mapping[str, Any] | None = None,
    show: bool = True,
) -> SFTRun:
    """Fine-tune, and leave a run folder.

    Args:
        config: the run.
        data, eval_data: lists of rows, in place of the config's files.
        on_update: called with the metrics of each optimiser step.
        extra: written into summary.json as it is.
        show: print progress.
    """
    with new_folder(config.out or default_out("sft")) as folder:
        run = build_sft_run(config, data=data, eval_data=eval_data)
    run.folder = folder
    resolved = {
        "precision": run.policy.precision, "threads": torch.get_num_threads(), "device": str(run.policy.device),
        "notes": run.notes, "torch": torch.__version__,
    }  # fmt: skip
    folder.write_config({"verb": "sft", "config": to_json(config), "resolved": resolved})
    run.summary.update(extra or {})
    _save(run)
    _advance(run, on_update, show)
    return run


def resume_sft(
    path: str | Path,
    *,
    data: Sequence[Any] | None = None,
    eval_data: Sequence[Any] | None = None,
    on_update: Callable[[dict[str, float]], None] | None = None,
    updates: int | None = None,
    show: bool = True,
) -> SFTRun:
    """Continue a run from its last checkpoint, to its own number of updates or to `updates`."""
    folder = RunFolder.open(path)
    saved = folder.read_config()
    config: SFTConfig = from_json(SFTConfig, saved["config"], str(folder.path / "config.json"))
    resolved = saved["resolved"]
    config = replace(
        config, out=str(path), precision=resolved["precision"], threads=resolved["threads"],
        updates=updates or config.updates,
    )  # fmt: skip
    run = build_sft_run(config, data=data, eval_data=eval_data)
    run.folder = folder
    step = folder.last_checkpoint()
    if step is None:
        raise HeelerError(f"{folder.path} has no checkpoint to continue from")
    checkpoint = folder.load_checkpoint(step)
    run.load_weights(checkpoint["weights"])
    run.optimizer.load_state_dict(checkpoint["optimizer"])
    run.step, run.tokens, run.seconds = step, checkpoint["tokens"], checkpoint["seconds"]
    run.best, run.summary = checkpoint["best"], checkpoint["summary"]
    summary = folder.path / "summary.json"  # the last thing that a run writes
    if run.step >= run.total and summary.exists():
        raise HeelerError(
            f"{folder.path} is complete: it has done {run.step} updates; give a larger --updates N to go on"
        )
    summary.unlink(missing_ok=True)
    folder.write_config({**saved, "config": to_json(config)})
    folder.forget_after(step)
    say(f"continuing {folder.path} after update {step}", show)
    _advance(run, on_update, show)
    return run


def _save(run: SFTRun) -> None:
    assert run.folder is not None
    run.folder.save_checkpoint(
        run.step,
        {
            "weights": run.weights(), "optimizer": run.optimizer.state_dict(), "tokens": run.tokens,
            "seconds": run.seconds, "best": run.best, "summary": run.summary,
        },
    )  # fmt: skip


def _advance(run: SFTRun, on_update: Callable[[dict[str, float]], None] | None, show: bool) -> None:
    """Train from the run's state to its end and export; what stops it says how the run goes on."""
    assert run.folder is not None
    go_on = f"continue with: heeler resume {run.folder.path}"
    try:
        _train_and_export(run, on_update, show)
    except KeyboardInterrupt as interrupt:
        said = str(interrupt) or "interrupted"
        raise KeyboardInterrupt(said if "heeler resume" in said else f"{said}; {go_on}") from None
    except NotWritten:
        raise
    except HeelerError as error:
        raise type(error)(
            f"{error} [after update {run.step}; {run.folder.path} holds update {run.folder.last_checkpoint()}, {go_on}]"
        ) from error


def _train_and_export(run: SFTRun, on_update: Callable[[dict[str, float]], None] | None, show: bool) -> None:
    folder, config = run.folder, run.config
    assert folder is not None
    for note in run.notes:
        say(note, show)
    if run.step == 0 and run.held_out:
        run.summary["eval/before"] = held_out_figures(run.policy, run.held_out, run.passes)
        say(f"held out before: {_describe(run.summary['eval/before'])}", show)
    bar = progress(run.total, "SFT", "update", done=run.step, show=show)
    with interruptible() as interrupted:
        try:
            while run.step < run.total and not interrupted.is_set():
                metrics = _update(run)
                if run.held_out and config.eval_every and run.step % config.eval_every == 0:
                    figures = _keep_if_best(run)
                    metrics |= {f"eval/{name}": value for name, value in figures.items()}
                    say(f"  {run.step}: held out {_describe(figures)}", show)
                folder.log(metrics)
                bar.update(1)
                bar.set_postfix_str(f"loss {metrics['loss']:.3f}", refresh=False)
                if on_update is not None:
                    on_update(metrics)
                if run.step % config.checkpoint_every == 0 or run.step == run.total or interrupted.is_set():
                    _save(run)
        finally:
            bar.close()
            folder.close()
    if run.step < run.total:
        raise KeyboardInterrupt(f"stopped after update {run.step}; continue with: heeler resume {folder.path}")
    _finish(run, show)


def _update(run: SFTRun) -> dict[str, float]:
    started, config = time.perf_counter(), run.config
    factor = config.lr_schedule.factor(run.step, run.total)
    for group in run.optimizer.param_groups:
        group["lr"] = config.lr * factor
    inputs = as_inputs(run.batch(run.step), run.policy.device)
    loss, targets = sft_gradients(run.policy, inputs, run.passes, config.pack)
    if not math.isfinite(loss):
        raise CheckFailed(
            f"the loss became {loss} at update {run.step + 1}: lower the learning rate, or look for NaN in the model's"
            " weights"
        )
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm))
    run.optimizer.step()
    seconds = time.perf_counter() - started
    run.step, run.tokens, run.seconds = run.step + 1, run.tokens + len(inputs.tokens), run.seconds + seconds
    return {
        "step": run.step, "loss": loss, "grad_norm": norm, "lr": config.lr * factor, "targets": float(targets),
        "tokens": run.tokens, "seconds": run.seconds, "tokens_per_second": len(inputs.tokens) / seconds,
    }  # fmt: skip


def _keep_if_best(run: SFTRun) -> dict[str, float]:
    figures = held_out_figures(run.policy, run.held_out, run.passes)
    if run.best is None or figures["loss"] < run.best["loss"]:
        run.best = {"step": run.step, "loss": figures["loss"], "weights": run.weights()}
    return figures


def _finish(run: SFTRun, show: bool) -> None:
    folder = run.folder
    assert folder is not None
    if run.held_out:
        figures = _keep_if_best(run)
        assert run.best is not None
        if run.best["step"] != run.step:
            say(f"update {run.best['step']} had the lowest held-out loss: its weights are exported", show)
            run.load_weights(run.best["weights"])
            figures = held_out_figures(run.policy, run.held_out, run.passes)
        run.summary["eval/after"] = figures
        run.summary["best"] = {"step": run.best["step"], "loss": run.best["loss"]}
        say(f"held out after: {_describe(figures)}", show)
    model = run.policy.export_model()

    def write(aside: Path) -> None:
        model.save_pretrained(aside / "policy")
        run.tokenizer.save_pretrained(aside / "policy")
        if run.policy.peft_model is not None:
            run.policy.peft_model.save_pretrained(aside / "policy" / "adapter")

    folder.export(write, folder.path)
    _sample(run, model)
    run.summary |= {
        "updates": run.step, "tokens": run.tokens, "seconds": round(run.seconds, 2),
        "peak_memory_gib": round(machine.peak_memory_gib(), 2),
    }  # fmt: skip
    folder.write_summary(run.summary)


def _sample(run: SFTRun, model: Any) -> None:
    """Complete a few held-out prompts with the exported model, beside what the data say."""
    assert run.folder is not None
    config = run.config
    examples = [e for e in run.held_out or run.train if any(e.is_target) and len(e.tokens) > 1][: config.sample_prompts]
    prompts = [_asked(e) for e in examples]
    if not prompts or config.sample_tokens < 1:
        return
    engine = native_engine(model.to(run.policy.device), eos_ids=run.eos_ids)
    requests = [Request(prompt=p, seed=draw_seed(config.seed, i)) for i, p in enumerate(prompts)]
    caps = [min(config.sample_tokens, _room_after(model, p)) for p in prompts]
    completions: dict[int, Completion] = {}
    for cap in sorted(set(caps)):
        chosen = [i for i, c in enumerate(caps) if c == cap]
        drawn = engine.generate([requests[i] for i in chosen], Sampling(max_new_tokens=cap))
        completions |= dict(zip(chosen, drawn, strict=True))
    samples = [
        {
            "update": run.step,
            "prompt": run.tokenizer.decode(p, skip_special_tokens=True),
            "completion": decode(run.tokenizer, completions[i]),
            "expected": run.tokenizer.decode(e.tokens[len(p) :], skip_special_tokens=True),
        }
        for i, (p, e) in enumerate(zip(prompts, examples, strict=True))
    ]
    run.folder.write_samples(samples)
    run.summary["examples"] = samples


def _asked(example: Example) -> list[int]:
    """What stands before the first target; of a text, which is all targets, its first tokens."""
    first = example.is_target.index(True)
    return example.tokens[: first or min(BEGINNING, len(example.tokens) // 2)]


def _room_after(model: Any, prompt: Sequence[int]) -> int:
    """Tokens that the model has positions for after a prompt that was trained on (at least the one that it learnt)."""
    if model.config.is_encoder_decoder:
        _, positions = loading.seq2seq_lengths(model)
    else:
        positions = loading.prompt_room(model, len(prompt))
    return sys.maxsize if positions is None else positions


def _describe(figures: Mapping[str, float]) -> str:
    return f"loss {figures['loss']:.3f} nats a token, perplexity {figures['perplexity']:.2f}"


def print_sft_report(run: SFTRun) -> None:
    """What a person sees at the end."""
    assert run.folder is not None
    for example in run.summary.get("examples", []):
        print(f"\n  {example['prompt'][-160:].strip()}")
        print(f"    wrote:    {example['completion'].strip()[:160]}")
        print(f"    expected: {example['expected'].strip()[:160]}")
    path = run.folder.path
    print(f"\n{run.step} updates, {run.seconds:.0f} s, peak {run.summary['peak_memory_gib']} GiB")
    print(f"{path}/policy is a plain transformers folder; PPO starts from it: heeler ppo lm --model {path} ...")

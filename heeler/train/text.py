"""PPO for language models: assembling policy, engine, prompts and rewards into a run.

from heeler import TextConfig, train_text
run = train_text(TextConfig(model="path", updates=50), prompts=["Once upon"], reward=my_reward)
print(run.sample("Once upon"))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import tyro

from heeler.data.prompts import PromptSet, load_prompts
from heeler.policies import loading
from heeler.policies.language_model import Critic, Full, LanguageModelPolicy, LoRA, TopLayers, Trainable, ValueHead
from heeler.policies.layer_parts import kernels_of_layers
from heeler.policies.llama import can_write_out, try_fused
from heeler.policies.seq2seq import Seq2SeqPolicy
from heeler.policies.token_masks import AllTokens, TokenMask, token_bias
from heeler.ppo.advantages import AdvantageConfig
from heeler.ppo.kl import AdaptiveKL, FixedKL, KLConfig, KLEstimator
from heeler.ppo.moments import RunningMoments
from heeler.ppo.schedules import Schedule
from heeler.ppo.shaping import ScoreShaping, Truncation
from heeler.ppo.update import PPOConfig
from heeler.rewards.functions import FunctionReward, RewardFunction, check_names, takes
from heeler.rewards.http import HTTPReward
from heeler.rewards.specs import load_judges, load_reward
from heeler.rollout.engines import kernels
from heeler.rollout.engines.batch import BatchEngine
from heeler.rollout.engines.draws import GREEDY, draw_seed
from heeler.rollout.engines.hf import HFEngine
from heeler.rollout.engines.native import NativeEngine, native_engine
from heeler.rollout.engines.vllm import VLLMEngine
from heeler.rollout.text import TextCollector, sample_rollout, samples_of
from heeler.runtime import machine
from heeler.runtime.configs import from_json
from heeler.runtime.fusing import fuse_on, fuses_on
from heeler.runtime.passes import PassBudget, pass_budget
from heeler.runtime.products import library_for
from heeler.runtime.progress import progress
from heeler.runtime.runs import RunFolder
from heeler.train.evaluate import Evaluation, evaluate_text
from heeler.train.optimizers import AdamW, check_installed, make_adamw
from heeler.train.ppo import Score, TrainState, UpdateReport
from heeler.train.run import Run, at_least, begin, default_out, new_folder, restore, resume
from heeler.train.scoring import make_score
from heeler.types import Engine, HeelerError, Reward, RewardOutput, Rollout, Samples, Sampling, Unavailable


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """A PPO run on a language model. Batch sizes are global.

    Attributes:
        model: folder or hub id of any causal or encoder-decoder LM that transformers loads.
        prompts: file (JSONL, JSON, CSV, Parquet) or data set (OWNER/NAME:SPLIT) with a "prompt" column (a string or
            chat messages); other columns reach the reward.
        reward: "module:function", the folder of a sequence classifier, the address of a reward server, a verifier such
            as "exact-match", or a sum of these such as "math + 0.1*repetition(3)" (docs/rewards.md).
        eval_prompts: the same as `prompts`, held out, for the figures before and after.
        judges: "name=REWARD" scorers that are only reported, never trained on.
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
        shaping: scaling, clipping and whitening of the scores.
        tokens: which tokens may be sampled.
        loss_weighting: every token counts the same, or every sequence.
        lr: peak learning rate of the policy's weights: 1e-4 suits top layers and LoRA, all weights want less
            (docs/settings.md).
        critic_lr: peak learning rate of the critic's weights; a fresh value head takes ten times the policy's.
        critic_warmup: updates at the beginning that train the critic only.
        lr_schedule: their course over the run.
        clip_schedule: factor on the clip range over the run.
        entropy_schedule: factor on the entropy coefficient over the run.
        optimizer: AdamW with its moments in 32 bits, or in 8 (adamw8bit, by bitsandbytes): 6 bytes less for a trained
            weight outside embeddings and small tensors.
        adam_betas: of AdamW.
        weight_decay: of AdamW.
        advantage: GAE.
        ppo: the update.
        engine: "native", "hf" for transformers' generate, or "vllm".
        engine_rows: completions sampled at once.
        engine_memory: share of a GPU that vllm takes.
        reuse_trunk_states: let the engine keep the frozen trunk's hidden states for the trainer.
        old_logprobs: of the policy that sampled: the engine's own, or computed anew by the "trainer", which costs a
            pass. "auto" takes the native engine's in fp32, where both agree to a few millionths of a nat.
        keep_first_pass: with one minibatch, let the pass that scores the old policy be the first one of the update too
            (rollouts of up to four token budgets): a forward pass less, for the memory of their activations.
        share_prompts: read a prompt once for all its samples, in the native engine and in the trainer's forward passes.
        record_steps: on a CUDA device, let the native engine record decoding steps and play them back (CUDA graphs).
        fuse_layers: on a GPU, let torch.compile fuse what lies between the matrix products of training and scoring; it
            costs seconds at the start, and has not been timed yet.
        activation_checkpointing: layers keep only their input for the backward pass and are computed again in it: less
            memory, a forward pass more in the update.
        precision: "auto" measures; fp32 or bf16.
        device: "auto" takes a GPU where there is one.
        threads: CPU threads; None takes one for each core that the process may use.
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
    shaping: ScoreShaping = ScoreShaping()
    tokens: TokenMask = AllTokens()
    loss_weighting: Literal["token", "sequence"] = "token"
    lr: float = 1e-4
    critic_lr: float = 1e-3
    critic_warmup: int = 0
    lr_schedule: Schedule = Schedule()
    clip_schedule: Schedule = Schedule()
    entropy_schedule: Schedule = Schedule()
    optimizer: AdamW = "adamw"
    adam_betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    advantage: AdvantageConfig = AdvantageConfig()
    ppo: PPOConfig = PPOConfig(epochs=2, minibatches=2)
    engine: Literal["native", "hf", "vllm"] = "native"
    engine_rows: int = 128
    engine_memory: float = 0.4
    reuse_trunk_states: bool = True
    old_logprobs: Literal["auto", "engine", "trainer"] = "auto"
    keep_first_pass: bool = True
    share_prompts: bool = True
    record_steps: bool = True
    fuse_layers: bool = False
    activation_checkpointing: bool = False
    precision: machine.Precision = "auto"
    device: str = "auto"
    threads: int | None = None
    eval_every: int = 0
    checkpoint_every: int = 20
    samples_logged: int = 4


ConfigT = TypeVar("ConfigT", bound=TextConfig)
RunT = TypeVar("RunT", bound="TextRun")


@dataclass(kw_only=True)
class TextRun(Run):
    """A run on a language model: everything that training, evaluation and sampling share."""

    verb = "ppo lm"
    best_figure = "reward_score"  # what is trained, also where a probability is shown
    rollouts_are_pure = True  # prompts and draws are functions of the seed and the update
    rewards_are_scores = True  # a cut completion was scored as a whole: `bootstrap` withholds that score

    config: TextConfig
    tokenizer: Any
    policy: LanguageModelPolicy
    engine: Engine
    reward: Reward
    judges: Mapping[str, Reward]
    prompts: PromptSet | None
    eval_prompts: PromptSet | None
    score_moments: RunningMoments = field(default_factory=RunningMoments)

    @property
    def trusts_engine(self) -> bool:
        """Whether the engine's log-probabilities are taken for the old policy's."""
        return takes_engine_logprobs(self.config, self.policy.precision)

    @property
    def keeps_first_pass(self) -> bool:
        """Whether the pass that scores the old policy is the first one of the update too: the same weights, the whole
        batch. Not where the engine's log-probabilities spare that pass."""
        return self.config.keep_first_pass and self.config.ppo.minibatches == 1 and not self.trusts_engine

    def collector(self) -> TextCollector:
        config = self.config
        assert self.prompts is not None
        return TextCollector(
            self.engine, self.tokenizer, self.prompts, config.sampling,
            prompts_per_update=config.prompts_per_update, samples_per_prompt=config.samples_per_prompt,
            seed=config.seed, reduce=self.reduce, device=self.policy.device,
        )  # fmt: skip

    def score(self) -> Score:
        return make_score(self)

    def rollout(self, prompts: PromptSet, seeds: Sequence[int]) -> Rollout:
        """One completion of each prompt by the published weights; `seeds` are their draws'."""
        indices = list(range(len(prompts)))
        return sample_rollout(
            self.engine, self.tokenizer, prompts, indices, [0] * len(indices), seeds, self.config.sampling,
            self.policy.device,
        )  # fmt: skip

    def samples_of(self, rollout: Rollout) -> Samples:
        """What rewards and judges see of a rollout."""
        return samples_of(rollout)

    def texts_of(self, rollout: Rollout) -> Sequence[str]:
        """What the policy wrote in each episode: of this, repetition is measured."""
        return rollout.completions

    def judge(self, rollout: Rollout) -> RewardOutput:
        """The rewards of a rollout, before any shaping."""
        return self.reward(self.samples_of(rollout))

    def judged(self, rollout: Rollout) -> RewardOutput:
        """`judge`; whatever is wrong with the reward, the run as it was can be saved and continued."""
        try:
            output = self.judge(rollout)
            check_names(output.components, "a component of the reward")
            return output
        except Unavailable:
            raise
        except HeelerError as error:
            raise Unavailable(str(error)) from error

    def episode_figures(self, rollout: Rollout) -> dict[str, torch.Tensor]:
        """Further figures of a rollout, `[S]` each, of which means are logged and evaluated."""
        return {}

    def can_evaluate(self) -> bool:
        return self.eval_prompts is not None

    def figures(self, show: bool, note: str) -> dict[str, float]:
        evaluation = self.evaluate(show)
        if note == "before":
            self.summary["eval/examples"] = [
                {"prompt": p, "before": c, "reward/before": r}
                for p, c, r in zip(evaluation.prompts[:8], evaluation.completions, evaluation.rewards, strict=False)
            ]
        elif note == "after":
            examples = self.summary.get("eval/examples", [])
            for example, text, value in zip(examples, evaluation.completions, evaluation.rewards, strict=False):
                example |= {"after": text, "reward/after": value}
        return evaluation.figures

    def export(self, folder: Path) -> None:
        export_policy(self, folder)

    def describe(self, metrics: Mapping[str, float]) -> str:
        return describe_update(metrics, self.config.updates)

    def describe_evaluation(self, figures: Mapping[str, float]) -> str:
        return f"reward {figures['reward']:.3f}, KL {figures['kl/ref']:z.2f} nats"

    def samples(self, report: UpdateReport) -> list[dict[str, Any]]:
        rollout = report.scored.rollout
        return [
            {
                "update": int(report.metrics["step"]),
                "prompt": rollout.prompts[i],
                "completion": rollout.completions[i],
                "reward": float(report.scored.scores[i]),
            }
            for i in range(min(self.config.samples_logged, len(rollout.prompts)))
        ]

    def resolved(self) -> dict[str, Any]:
        old_logprobs = "engine" if self.trusts_engine else "trainer"
        kernels = kernels_of(self.policy, self.engine)
        return {"precision": self.policy.precision, "old_logprobs": old_logprobs, **kernels, **super().resolved()}

    def save_state(self) -> dict[str, Any]:
        return {"score_moments": vars(self.score_moments)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.score_moments = RunningMoments(**state["score_moments"])

    def publish(self) -> None:
        self.engine.begin()
        self.engine.load(self.policy.published())
        self.engine.commit(self.state.step)

    def evaluate(self, show: bool = False) -> Evaluation:
        """Figures on the evaluation prompts with the policy as it is now; `show` draws a progress bar."""
        if self.eval_prompts is None:
            raise HeelerError("the run has no evaluation prompts: give a file of prompts")
        self.publish()
        total = len(self.eval_prompts) * self.most_tokens()
        bar = progress(total, "evaluating", "token", show=show)
        if isinstance(self.engine, BatchEngine):
            self.engine.on_progress = bar.update
        try:
            # the draws depend on the seed and the prompt only, so before and after differ by the policy alone
            seeds = [draw_seed(self.config.seed, 0xE7A1, i) for i in range(len(self.eval_prompts))]
            rollout = self.rollout(self.eval_prompts, seeds)
            bar.update(max(total - bar.n, 0))  # completions that ended early
            bar.close()
            count = len(self.eval_prompts)
            bar = progress(count * (2 + len(self.judges)), "judging", "text", show=show)  # reward, perplexity, judges
            scored = self.judged(rollout)
            bar.update(count)
            evaluation = evaluate_text(
                self.policy, rollout, self.samples_of(rollout), scored, self.judges,
                texts=self.texts_of(rollout), passes=self.state.passes, on_judged=bar.update,
                engine_logprobs=rollout.behavior_logprobs if self.trusts_engine else None,
            )  # fmt: skip
            evaluation.figures.update({k: float(x.float().mean()) for k, x in self.episode_figures(rollout).items()})
            return evaluation
        finally:
            bar.close()
            if isinstance(self.engine, BatchEngine):
                self.engine.on_progress = None

    def most_tokens(self) -> int:
        """Tokens that are sampled for a prompt at most."""
        return self.config.sampling.max_new_tokens

    def sample(self, *prompts: Any, seed: int = 0) -> list[str]:
        """Completions of strings or chats by the policy as it is now."""
        self.publish()
        loaded = load_prompts(list(prompts), self.tokenizer, max_tokens=None)
        rollout = self.rollout(loaded, [draw_seed(seed, i) for i in range(len(loaded))])
        return list(rollout.completions)


def kernels_of(policy: LanguageModelPolicy, engine: Engine) -> dict[str, Any]:
    """Which ways through the model were chosen, for config.json.

    `attention` is Heeler's or the name of transformers' own, `packing` whose blocks hold the weights while the engine
    samples; `layers_written_out` and `steps_written_out` say whether training and sampling run Heeler's own layers,
    `steps_compiled` and `layers_compiled` whether what lies between their products was compiled here, `steps_recorded`
    whether a GPU plays recorded steps back, `layers_fused` whether torch.compile fuses what lies between the products.
    """
    packs = isinstance(engine, BatchEngine) and engine.pack_weights
    products = machine.type_of(policy.precision)
    states = torch.zeros(1, device=policy.device)
    library = library_for(policy.engine_model.get_output_embeddings().weight) if packs else None
    return {
        "attention": policy.model.config.get_text_config(decoder=True)._attn_implementation,
        "packing": library or "none",
        "layers_written_out": can_write_out(policy.top),
        "steps_written_out": isinstance(engine, NativeEngine) and engine.written_out,
        "steps_compiled": isinstance(engine, NativeEngine) and engine.step_compiled,
        "steps_recorded": isinstance(engine, NativeEngine) and engine.steps_recorded,
        "layers_compiled": can_write_out(policy.top) and kernels_of_layers(states, products) is not None,
        "layers_fused": can_write_out(policy.top) and fuses_on(policy.device),
    }


def _fuse(wanted: bool, policy: LanguageModelPolicy, tokens: int | None) -> list[str]:
    """Let torch.compile fuse what lies between products where that is wanted; why it does not."""
    fuse_on(policy.device, False)  # of an earlier run in this process
    if not wanted:
        return []
    if policy.device.type == "cpu":  # perhaps a run that was made on a GPU
        return ["--fuse-layers changes nothing on a CPU, where what lies between matrix products is compiled already"]
    if not can_write_out(policy.top):
        return ["--fuse-layers changes nothing here: this model's layers run by transformers"]
    head, products = policy.model.get_output_embeddings().weight, machine.type_of(policy.precision)
    reason = try_fused(policy.top, head, products, pass_budget(tokens, policy.device))
    return [f"what lies between matrix products is not fused, which is slower: {reason}"] if reason else []


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
    at_least(
        {
            "--updates": (config.updates, 1),
            "--prompts-per-update": (config.prompts_per_update, 1),
            "--samples-per-prompt": (config.samples_per_prompt, 1),
            "--sampling.max-new-tokens": (config.sampling.max_new_tokens, 1),
            "--sampling.temperature": (config.sampling.temperature, GREEDY),
            "--engine-rows": (config.engine_rows, 1),
            "--checkpoint-every": (config.checkpoint_every, 1),
            "--ppo.minibatches": (config.ppo.minibatches, 1),
        }
    )
    if isinstance(config.kl, AdaptiveKL):
        at_least({"--kl.target": (config.kl.target, 1e-3), "--kl.horizon": (config.kl.horizon, 1)})
    check_installed(config.optimizer)
    if config.sampling.top_k != 0 or config.sampling.top_p != 1.0:
        raise HeelerError(
            f"--sampling.top-k {config.sampling.top_k} and --sampling.top-p {config.sampling.top_p} are for"
            " heeler sample: PPO compares the probabilities of all tokens before and after, and a cut distribution"
            " draws with others; leave them at 0 and 1, and give a lower --sampling.temperature"
        )
    if config.advantage.recompute:
        raise HeelerError(
            "--advantage.recompute is for environments: for a language model it would cost a pass through the model in"
            " each epoch; leave it off"
        )
    machine.keep_freed_memory()
    machine.set_threads(config.threads)
    machine.seed_everything(config.seed)
    device = machine.choose_device(config.device)
    precision, why = machine.choose_precision(config.precision, device)
    scorer: Reward
    if reward is None:
        scorer = load_reward(config.reward, device, precision)
    elif takes(reward, "completions"):
        inner: Any = getattr(reward, "func", reward)  # of functools.partial
        scorer = FunctionReward(reward, getattr(inner, "__name__", type(inner).__name__))  # pyright: ignore
    else:
        scorer = reward  # pyright: ignore
        if isinstance(scorer, HTTPReward):
            scorer.check()
    judges = load_judges(config.judges)
    tokenizer = loading.load_tokenizer(config.model)

    model = loading.load_language_model(config.model)
    room = loading.prompt_room(model, config.sampling.max_new_tokens, value_after=config.truncation == "bootstrap")
    source = prompts if prompts is not None else config.prompts
    loaded = load_prompts(source, tokenizer, max_tokens=room) if len(source) else None
    eval_source = eval_prompts if eval_prompts is not None else config.eval_prompts
    loaded_eval = load_prompts(eval_source, tokenizer, max_tokens=room) if eval_source else None

    eos_ids = loading.end_of_sequence_ids(model, tokenizer)
    vocab_size = int(model.get_output_embeddings().weight.shape[0])
    bias = token_bias(config.tokens, tokenizer, vocab_size, eos_ids)
    seq2seq = model.config.is_encoder_decoder
    policy = (Seq2SeqPolicy if seq2seq else LanguageModelPolicy)(
        model,
        trainable=config.trainable,
        critic=config.critic,
        temperature=config.sampling.temperature,
        precision=precision,
        entropy_gradient=config.ppo.entropy_coef != 0,
        seed=config.seed,
        token_bias=bias,
        share_prompts=config.share_prompts,
        device=device,
    )
    unfused = _fuse(config.fuse_layers, policy, config.ppo.token_budget)
    if config.activation_checkpointing:
        policy.checkpoint_activations()
    keep_states = config.reuse_trunk_states and policy.trunk is not None and config.truncation != "bootstrap"
    options: dict[str, Any] = {
        "eos_ids": eos_ids,
        "max_rows": config.engine_rows,
        "token_bias": bias,
        "tokenizer": tokenizer,
    }
    if seq2seq and config.engine != "native":
        raise HeelerError(f"the {config.engine} engine samples causal models only: leave --engine native")
    engine: Engine
    match config.engine:
        case "hf":
            engine = HFEngine(policy.engine_model, **options)
        case "vllm":
            engine = VLLMEngine(policy.engine_model, **options, memory=config.engine_memory)
        case "native":
            if keep_states:
                options["trunk_layers"] = policy.num_trunk_layers
            if takes_engine_logprobs(config, precision) and not seq2seq and isinstance(config.critic, ValueHead):
                options["final_states"] = config.truncation != "bootstrap"  # which wants a state more
            if not seq2seq:
                options["record_steps"] = config.record_steps
            engine = native_engine(policy.engine_model, **options, share_prompts=config.share_prompts)
    if precision == "bf16":
        config = replace(config, ppo=replace(config.ppo, ratio_tolerance=max(config.ppo.ratio_tolerance, 0.05)))
    groups = policy.parameter_groups()
    rates = {"policy": config.lr, "critic": config.critic_lr}
    for group in groups:
        group["lr"] = group["base_lr"] = rates[group["name"]]
        group["starts_at"] = config.critic_warmup if group["name"] == "policy" else 0
    optimizer = make_adamw(
        config.optimizer, groups, policy.networks(), device=device, betas=config.adam_betas,
        weight_decay=config.weight_decay,
    )  # fmt: skip
    state = TrainState(
        policy=policy,
        optimizer=optimizer,
        generator=torch.Generator().manual_seed(config.seed),
        passes=PassBudget(pass_budget(config.ppo.token_budget, policy.device)),
        kl_coef=config.kl.coef,
    )
    trained = sum(p.numel() for p in groups[0]["params"])
    notes = [
        f"{device}, {machine.say_threads()}, {why}",
        f"training {trained / 1e6:.1f}M of {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M weights"
        f" ({_describe(config.trainable)}), ends of sequence {eos_ids or 'none'}",
        *policy.notes,
        *unfused,
    ]
    if isinstance(engine, NativeEngine) and device == "cpu" and not engine.written_out:
        notes.append(
            f"the engine samples {type(model).__name__} through transformers, which is slower: its own decoding step"
            " knows Llama, Mistral, Qwen2 and Qwen3 without windows"
        )
    elif isinstance(engine, NativeEngine) and device == "cpu" and not engine.step_compiled:
        reason = kernels.loaded()[1] or "its heads are of a width that is not built"
        notes.append(f"what lies between matrix products is torch's, which is slower than compiled kernels: {reason}")
    if loaded and loaded_eval:
        both = len(set(map(tuple, loaded.tokens)) & set(map(tuple, loaded_eval.tokens)))
        if both:
            notes.append(f"{both} of the evaluation prompts are trained on too: figures on them are not held out")
    return TextRun(
        config=config, tokenizer=tokenizer, policy=policy, engine=engine, reward=scorer, judges=judges,
        prompts=loaded, eval_prompts=loaded_eval, state=state, notes=notes,
    )  # fmt: skip


def takes_engine_logprobs(config: TextConfig, precision: str) -> bool:
    """What `old_logprobs` comes to in this precision."""
    agree = config.engine == "native" and precision == "fp32"
    return config.old_logprobs == "engine" or (config.old_logprobs == "auto" and agree)


def _describe(trainable: Trainable) -> str:
    match trainable:
        case Full():
            return "all"
        case TopLayers(layers=layers):
            return f"top {layers} layers"
        case LoRA(rank=rank, layers=layers, quantize=quantize):
            kept = f", their own weights in 4 bits ({quantize})" if quantize != "none" else ""
            return f"LoRA rank {rank} on {'all' if layers is None else f'the top {layers}'} layers{kept}"


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
    with new_folder(config.out or default_out("lm")) as folder:
        run = build_text_run(config, prompts=prompts, eval_prompts=eval_prompts, reward=reward)
        if run.prompts is None:
            raise HeelerError('no prompts were given: --prompts FILE.jsonl with a "prompt" column')
    begin(run, folder, on_update, extra, show)
    return run


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
    if run.prompts is None:
        raise HeelerError(f"{path} was trained on prompts given in Python: resume it there, with the same prompts")
    resume(run, on_update, show)
    return run


def load_text_run(
    path: str | Path,
    *,
    prompts: Sequence[Any] | None = None,
    eval_prompts: Sequence[Any] | None = None,
    reward: RewardFunction | Reward | None = None,
    updates: int | None = None,
) -> TextRun:
    """Assemble a run from its folder and put it into the state of its last checkpoint."""

    def build(config: TextConfig) -> TextRun:
        return build_text_run(config, prompts=prompts, eval_prompts=eval_prompts, reward=reward)

    return load_run(path, TextConfig, build, updates)


def load_run(
    path: str | Path, kind: type[ConfigT], build: Callable[[ConfigT], RunT], updates: int | None = None
) -> RunT:
    """Assemble the run of a folder whose config is a `kind`, in the state of its last checkpoint."""
    folder = RunFolder.open(path)
    saved = folder.read_config()
    config: ConfigT = from_json(kind, saved["config"], str(folder.path / "config.json"))
    resolved = saved["resolved"]
    config = replace(
        config,
        out=str(path),
        precision=resolved["precision"],
        threads=resolved["threads"],
        updates=updates or config.updates,
    )
    run = build(config)
    restore(run, folder)
    return run


def export_policy(run: TextRun, folder: Path) -> None:
    """`policy/`, a folder that plain transformers loads (adapters merged, and beside it), and `critic/`."""
    from safetensors.torch import save_file

    run.policy.export_model().save_pretrained(folder / "policy")
    run.tokenizer.save_pretrained(folder / "policy")
    if run.policy.peft_model is not None:
        run.policy.peft_model.save_pretrained(folder / "policy" / "adapter")
    (folder / "critic").mkdir(exist_ok=True)
    save_file(run.policy.critic_state(), folder / "critic" / "critic.safetensors")


def describe_update(metrics: Mapping[str, float], total: int) -> str:
    reward = metrics.get("reward/probability", metrics["reward/mean"])
    return (
        f"{int(metrics['step']):4d}/{total}  reward {reward:6.3f}  KL {metrics['kl/ref']:z5.2f}"
        f"  clipped {metrics['policy/clip_fraction']:4.0%}  explained {metrics['value/explained_variance']:5.2f}"
        f"  length {metrics['completion/length']:5.1f}  {metrics['decisions_per_second']:5.0f} tokens/s"
    )

"""PPO updates of TRL's PPOTrainer, timed. Started by update_speed.py and trl_learning.py with the Python of TRL's own
environment.

    python trl_update.py JOB.json RESULT.json

It needs nothing of Heeler. The stages are timed where the trainer changes from one to the next: around its function
`batch_generation`, and at the first call of its function `forward` with the trained model. Nothing else is changed.
"""

from __future__ import annotations

import json
import resource
import sys
import time
import types
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer


class StageClock(TrainerCallback):
    """Seconds of every update and of its stages, and what was sampled."""

    def __init__(self, response_length: int, prompts: int, end: int, pad: int) -> None:
        self.response_length, self.prompts, self.end, self.pad = response_length, prompts, end, pad
        self.trained: Any = None
        self.figures: dict[str, list[float]] = {
            name: [] for name in ("seconds", "rollout", "score", "update", "tokens", "peak_gib")
        }
        self.start = self.generated = self.scored = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        end = time.perf_counter()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        stages = {
            "seconds": end - self.start,
            "rollout": self.generated - self.start,
            "score": self.scored - self.generated,
            "update": end - self.scored,
            "peak_gib": peak / (2**30 if sys.platform == "darwin" else 2**20),
        }
        for name, value in stages.items():
            self.figures[name].append(value)
        self.start, self.scored = end, 0.0

    def watch(self, module: Any) -> None:
        """Put the clock around the trainer module's two functions."""
        generation, forward = module.batch_generation, module.forward

        def watched_generation(model: Any, queries: Any, *rest: Any) -> Any:
            rows, logits = generation(model, queries, *rest)
            self.generated = time.perf_counter()
            responses = rows[:, queries.shape[1] :]
            if tuple(responses.shape) != (self.prompts, self.response_length):
                raise SystemExit(f"TRL sampled {tuple(responses.shape)}, not {self.prompts} x {self.response_length}")
            ended = ((responses == self.end) | (responses == self.pad)).int().cumsum(1)
            self.figures["tokens"].append(int((ended.cumsum(1) <= 1).sum()))  # the end itself was sampled too
            return rows, logits

        def watched_forward(model: Any, *rest: Any) -> Any:
            if model is self.trained and not self.scored:
                self.scored = time.perf_counter()
            return forward(model, *rest)

        module.batch_generation, module.forward = watched_generation, watched_forward


class TextScores(torch.nn.Module):
    """A classifier with a tokenizer of its own, in the form in which the trainer asks reward models: it decodes the
    tokens, and gives every position the score of the whole text."""

    base_model_prefix = "body"

    def __init__(self, path: str, tokenizer: Any, end: int) -> None:
        super().__init__()
        self.body, self.score = self._Body(path, tokenizer, end), torch.nn.Identity()

    class _Body(torch.nn.Module):
        def __init__(self, path: str, tokenizer: Any, end: int) -> None:
            super().__init__()
            self.classifier = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
            self.reader, self.tokenizer, self.end = AutoTokenizer.from_pretrained(path), tokenizer, end
            self.told: list[tuple[float, float]] = []  # mean logit and mean probability of each call

        @torch.no_grad()
        def forward(self, input_ids: Any, attention_mask: Any, **_: Any) -> Any:
            rows = [ids[seen.bool()].tolist() for ids, seen in zip(input_ids, attention_mask, strict=True)]
            texts = [self.tokenizer.decode(row, skip_special_tokens=True) for row in rows]
            logits = self.classifier(**self.reader(texts, padding=True, truncation=True, return_tensors="pt")).logits
            self.told.append((float(logits.mean()), float(logits.sigmoid().mean())))
            states = logits[:, :1, None].expand(-1, input_ids.shape[1], 1)
            return types.SimpleNamespace(hidden_states=(states,))


class Told(TrainerCallback):
    """The KL to the reference of every update, as the trainer logs it: nats a sequence."""

    def __init__(self) -> None:
        self.kl: list[float] = []

    def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        if logs is not None and "objective/kl" in logs:
            self.kl.append(logs["objective/kl"])


def weight_sums(model: Any) -> dict[str, float]:
    return {name: float(p.detach().double().abs().sum()) for name, p in model.named_parameters()}


def main(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    torch.manual_seed(job.get("seed", 0))
    torch.set_num_threads(job["threads"])
    path, prompts = job["model"], job["prompts"]
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    # the trainer takes every pad token for padding, so it must be one that neither prompts nor the end of text use
    tokenizer.pad_token = tokenizer.unk_token
    policy = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    value = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=torch.float32)
    end = policy.config.eos_token_id
    if job.get("classifier"):
        reward: Any = TextScores(job["classifier"], tokenizer, end)
        judged = [policy, reference, value]
    else:
        reward = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=torch.float32)
        judged = [policy, reference, value, reward]
    for model in judged:
        model.config.pad_token_id = tokenizer.pad_token_id
    policy.generation_config.pad_token_id = tokenizer.pad_token_id

    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    if any(tokenizer.pad_token_id in row for row in ids):
        raise SystemExit("a prompt holds the padding token")
    rows, batch = job["rows"], job.get("batch", len(prompts))  # prompts of a pass, and of an update
    config = PPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=batch // rows,
        local_rollout_forward_batch_size=batch,
        total_episodes=batch * job["updates"],
        seed=job.get("seed", 42),
        num_ppo_epochs=1,
        num_mini_batches=1,
        response_length=job["response_tokens"],
        temperature=1.0,
        stop_token_id=end,
        missing_eos_penalty=None,
        learning_rate=job["lr"],
        kl_coef=job["kl_coef"],
        gamma=1.0,
        lam=0.95,
        bf16=job.get("bf16", False),
        use_cpu=True,
        gradient_checkpointing=False,
        num_sample_generations=0,
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    clock, told = StageClock(job["response_tokens"], batch, end, tokenizer.pad_token_id), Told()
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": ids}),
        callbacks=[clock, told],
    )
    clock.trained = trainer.model
    clock.watch(ppo_trainer)
    before = [weight_sums(model) for model in (policy, value, reference)]
    trainer.train()
    changed = [before[i] != weight_sums(model) for i, model in enumerate((policy, value, reference))]
    checks = {
        "updates": len(clock.figures["seconds"]) == job["updates"] == trainer.state.global_step,
        "policy and critic were trained, the reference was not": changed == [True, True, False],
        "dropout is off": all(m.p == 0 for m in trainer.model.modules() if isinstance(m, torch.nn.Dropout))
        and not getattr(policy.config, "attention_dropout", 0.0),
        "weights are fp32": {p.dtype for p in trainer.model.parameters()} == {torch.float32},
    }
    failed = [name for name, passed in checks.items() if not passed]
    if failed:
        raise SystemExit("TRL did something else than was asked: " + "; ".join(failed))
    packages = ("trl", "torch", "transformers", "accelerate", "datasets", "tokenizers", "numpy")
    return {
        **clock.figures,
        "scores": reward.body.told if job.get("classifier") else [],
        "kl": told.kl,
        "prompt_tokens": sum(map(len, ids)),
        "precision": "bf16 by autocast" if config.bf16 else "fp32",
        "threads": torch.get_num_threads(),
        "last_log": trainer.state.log_history[-1],
        "versions": {"python": sys.version.split()[0], **{name: version(name) for name in packages}},
    }


if __name__ == "__main__":
    given, wanted = Path(sys.argv[1]), Path(sys.argv[2])
    wanted.write_text(json.dumps(main(json.loads(given.read_text(encoding="utf-8")), given.parent)), encoding="utf-8")

"""A 1B-class model on a GPU: sampling, one PPO update, and the numbers against fp32 on the CPU.

    python benchmarks/gpu.py [--peak-tflops 989]

A Llama of 1.24B random weights (hidden 2048, 16 layers, vocabulary 128,256) in bf16. Sampled: Heeler's native engine
(its steps recorded as CUDA graphs, and not), transformers' generate, and its continuous batching, on the same prompts.
Updated: one PPO update of all weights with a value head, its layers fused and not. Utilisation counts 6 operations a
weight and token, and those of attention, against `--peak-tflops`, or against the rate of one large bf16 product where
it is not given. Compared: log-probabilities on the device in bf16 and in fp32 with those of the CPU in fp32. Writes
docs/benchmarks/gpu.md; `--tiny` tries the script on any machine.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from heeler import Full, PPOConfig, Sampling, TextConfig  # noqa: E402
from heeler.data.prompts import PromptSet  # noqa: E402
from heeler.policies.language_model import LanguageModelPolicy, ValueHead  # noqa: E402
from heeler.policies.loading import load_causal_lm  # noqa: E402
from heeler.rollout.engines.native import NativeEngine  # noqa: E402
from heeler.rollout.text import pack  # noqa: E402
from heeler.runtime.fusing import fuse_on  # noqa: E402
from heeler.runtime.reduce import LocalReduce  # noqa: E402
from heeler.train.ppo import train_loop  # noqa: E402
from heeler.train.text import build_text_run  # noqa: E402
from heeler.types import Completion, HeelerError, Request  # noqa: E402

OURS = "Heeler, native"
Precision = Literal["fp32", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")


@dataclass(frozen=True)
class Plan:
    """Sizes of everything.

    Attributes:
        model: arguments of a LlamaConfig.
        prompts, prompt, response: of sampling.
        update_prompts, update_response: of the update.
        compared: sequences whose log-probabilities are compared, of `prompt` and 32 tokens.
    """

    model: dict[str, Any]
    prompts: int
    prompt: int
    response: int
    update_prompts: int
    update_response: int
    compared: int


LARGE = Plan(
    model={
        "vocab_size": 128256, "hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 4096,
        "tie_word_embeddings": True, "pad_token_id": None,
    },
    prompts=256, prompt=128, response=256, update_prompts=64, update_response=512, compared=4,
)  # fmt: skip
TINY = Plan(
    model={
        **LARGE.model, "vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    },
    prompts=6, prompt=8, response=12, update_prompts=4, update_response=8, compared=2,
)  # fmt: skip


def synchronised(device: str) -> float:
    """The time, once the device has done all that it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def save_model(plan: Plan, folder: Path) -> str:
    import transformers

    from tests.tiny import byte_tokenizer

    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**plan.model)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def random_prompts(plan: Plan, count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, plan.model["vocab_size"], (count, plan.prompt), generator=generator).tolist()


def matrix_rate(device: str, size: int) -> float:
    """Operations a second of one large bf16 product."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    best = float("inf")
    for _ in range(8):
        begun = synchronised(device)
        torch.matmul(a, a)
        best = min(best, synchronised(device) - begun)
    return 2.0 * size**3 / best


def sampling(plan: Plan, folder: str, device: str, precision: Precision) -> dict[str, float | str]:
    """Tokens a second of each system, or why it gave none; the second of two calls counts."""
    from transformers import GenerationConfig

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = load_causal_lm(folder).to(device=device, dtype=dtype)
    prompts = random_prompts(plan, plan.prompts)
    engine = NativeEngine(load_causal_lm(folder).to(device=device, dtype=dtype), eos_ids=[], max_rows=plan.prompts)
    plain = NativeEngine(engine.model, eos_ids=[], max_rows=plan.prompts, record_steps=False)
    config = GenerationConfig(max_new_tokens=plan.response, do_sample=True, top_k=0, eos_token_id=None, pad_token_id=0)

    def native(engine: NativeEngine) -> int:
        requests = [Request(prompt=prompt, seed=i) for i, prompt in enumerate(prompts)]
        return sum(len(c.tokens) for c in engine.generate(requests, Sampling(max_new_tokens=plan.response)))

    def generate() -> int:
        ids = torch.tensor(prompts, device=device)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        return out[:, plan.prompt :].numel()

    def continuous() -> int:
        out = model.generate_batch(inputs=prompts, generation_config=config, progress_bar=False)
        return sum(len(each.generated_tokens) for each in out.values())

    systems: dict[str, Callable[[], int]] = {
        OURS: partial(native, engine),
        "Heeler, native, no step recorded": partial(native, plain),
        "transformers' generate": generate,
    }
    if device.startswith("cuda"):  # written for GPUs: a CPU takes most of a minute for six prompts
        systems["transformers' continuous batching"] = continuous
    found: dict[str, float | str] = {}
    for name, system in systems.items():
        try:
            system()
            begun = synchronised(device)
            tokens = system()
            found[name] = tokens / (synchronised(device) - begun)
            if tokens != plan.prompts * plan.response:
                found[name] = f"sampled {tokens} tokens, not {plan.prompts * plan.response}"
        except Exception as error:  # a peer that does not run here is a line of the table
            if name.startswith(OURS):
                raise
            found[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
        print(name, found[name], flush=True)
    return found


def update(plan: Plan, folder: str, device: str, precision: Precision, fused: bool = False) -> dict[str, float]:
    """Seconds of the stages of the second update, its trained tokens, operations, and the peak memory in GiB."""
    config = TextConfig(
        model=folder, prompts_per_update=plan.update_prompts, sampling=Sampling(max_new_tokens=plan.update_response),
        trainable=Full(), lr=1e-6, ppo=PPOConfig(token_budget=32768), precision=precision, device=device,
        engine_rows=plan.update_prompts, fuse_layers=fused,
    )  # fmt: skip
    run = build_text_run(config, reward=lambda prompts, completions, **columns: [0.0] * len(prompts))
    rows = random_prompts(plan, plan.update_prompts)
    run.prompts = PromptSet(prompts=[str(row) for row in rows], tokens=rows, columns={}, name="random tokens")
    run.engine.eos_ids = run.engine.eos_ids[:0]  # pyright: ignore
    if fused and not run.resolved()["layers_fused"]:
        raise HeelerError(run.notes[-1])
    seen: list[dict[str, float]] = []
    two = replace(run.config, updates=2)
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    train_loop(
        run.state, run.collector(), run.score(), two, LocalReduce(), lambda r: bool(seen.append(r.metrics)) or True
    )
    weights = sum(p.numel() for p in run.policy.model.parameters())
    length = plan.prompt + plan.update_response - 1
    tokens = plan.update_prompts * length
    layers, width = plan.model["num_hidden_layers"], plan.model["hidden_size"]
    attention = 3 * 4 * layers * width * plan.update_prompts * length * (length + 1) / 2
    return {
        **{stage: seen[1][f"time/{stage}"] for stage in ("rollout", "score", "update")},
        "tokens": tokens,
        "operations": 6.0 * weights * tokens + attention,
        "peak": torch.cuda.max_memory_allocated() / 2**30 if device.startswith("cuda") else float("nan"),
    }


def differences(plan: Plan, folder: str, device: str) -> dict[str, tuple[float, float]]:
    """Mean and largest difference, in nats a token, of log-probabilities from those of the CPU in fp32."""
    fuse_on(torch.device(device), False)
    prompts = random_prompts(plan, plan.compared)
    generator = torch.Generator().manual_seed(2)
    drawn = torch.randint(1, plan.model["vocab_size"], (plan.compared, 32), generator=generator)

    def logprobs(where: str, precision: Precision) -> torch.Tensor:
        model = load_causal_lm(folder).to(where)
        policy = LanguageModelPolicy(model, trainable=Full(), critic=ValueHead(), precision=precision)
        completions = [
            Completion(tokens=row, logprobs=torch.zeros(32), finish_reason="length", version=0)
            for row in drawn.tolist()
        ]
        return policy.logprobs(pack(prompts, completions, torch.device(where))).cpu()

    expected = logprobs("cpu", "fp32")
    found: dict[str, tuple[float, float]] = {}
    for precision in PRECISIONS:
        apart = (logprobs(device, precision) - expected).abs()
        found[precision] = float(apart.mean()), float(apart.max())
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--peak-tflops", type=float, help="of the GPU in dense bf16, from its data sheet")
    parser.add_argument("--tiny", action="store_true", help="a model of 2 small layers: tries the script")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks" / "gpu.md")
    given = parser.parse_args(arguments)
    on_gpu = given.device.startswith("cuda")
    if not on_gpu and not given.tiny:
        parser.error("there is no GPU here: --tiny tries the script on a CPU")
    plan = TINY if given.tiny else LARGE
    precision: Precision = "bf16" if on_gpu else "fp32"
    with tempfile.TemporaryDirectory() as scratch:
        folder = save_model(plan, Path(scratch))
        rate = matrix_rate(given.device, 64 if given.tiny else 8192)
        peak = 1e12 * given.peak_tflops if given.peak_tflops else rate
        speeds = sampling(plan, folder, given.device, precision)
        ways = {"torch's operations between the products": False, "fused by torch.compile": True}
        updates: dict[str, dict[str, float]] = {}
        failures: list[str] = []
        for name, fused in ways.items():
            gc.collect()  # what the run before left is not in this one's peak
            try:
                if on_gpu or not fused:
                    updates[name] = update(plan, folder, given.device, precision, fused)
            except HeelerError as error:
                failures.append(f"{name}: {error}.")
        apart = differences(plan, folder, given.device)
    native = speeds[OURS]
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    options = " --tiny" * given.tiny + (f" --peak-tflops {given.peak_tflops:g}" if given.peak_tflops else "")
    command = f"python benchmarks/gpu.py{options}"
    lines = [
        "# A 1B-class model on a GPU" if not given.tiny else "# A trial of benchmarks/gpu.py, no result",
        "",
        f"Made by `{command}`. Device: {name}; one large bf16 product runs at {rate / 1e12:.3g} TFLOP/s. torch"
        f" {torch.__version__}, {precision}.",
        "",
        f"## Sampling: {plan.prompts} prompts of {plan.prompt} tokens, {plan.response} tokens each",
        "",
        "| system | tokens/s | times as fast as it |",
        "|---|---|---|",
        *(
            f"| {system} | {speed:.0f} | {float(native) / speed:.1f} |"
            if isinstance(speed, float)
            else f"| {system} | {speed} | |"
            for system, speed in speeds.items()
        ),
        "",
        f"## One PPO update: {plan.update_prompts} prompts of {plan.prompt} tokens, {plan.update_response} each",
        "",
        f"The second update of a run; utilisation is that of its third stage, as a share of {peak / 1e12:.3g} TFLOP/s.",
        "",
        "| layers | rollout, s | scores, s | update, s | tokens/s in it | utilisation | peak memory, GiB |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {name} | {of['rollout']:.2f} | {of['score']:.2f} | {of['update']:.2f} |"
            f" {of['tokens'] / of['update']:.0f} | {of['operations'] / of['update'] / peak:.1%} | {of['peak']:.1f} |"
            for name, of in updates.items()
        ),
        *(["", *failures] if failures else []),
        "",
        "## Log-probabilities against fp32 on the CPU, nats a token",
        "",
        "| precision on the device | mean difference | largest |",
        "|---|---|---|",
        *(f"| {which} | {mean:.2e} | {most:.2e} |" for which, (mean, most) in apart.items()),
    ]
    given.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

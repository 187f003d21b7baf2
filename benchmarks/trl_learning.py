"""Does Heeler learn what TRL learns? The same PPO on movie reviews by both, reward over the updates.

    python benchmarks/trl_learning.py [--seeds 1 2 3] [--updates 20] [--threads 1] [--parallel 2] [--collect-only]

SmolLM2-135M, all weights, a critic and a frozen reference of the same size; 64 prompts (the first 8 words of reviews)
with 24 tokens an update, 1 epoch of 1 minibatch; the reward is the demo's reward model for both. Rates, clipping, KL
coefficient, discounts and Adam are equal. Prompts are the same set in orders of their own, and draws differ, so single
updates are not comparable; curves over seeds are. TRL runs in the environment that update_speed.py makes. Runs are kept
in docs/data/trl_learning.json and not repeated. Writes docs/benchmarks/trl_learning.md and its picture.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from pages import hardware  # noqa: E402
from update_speed import in_process, trl_python  # noqa: E402

DATA = ROOT / "docs" / "data" / "trl_learning.json"
PICTURE = ROOT / "docs" / "images" / "trl_learning.png"
PAGE = ROOT / "docs" / "benchmarks" / "trl_learning.md"
BATCH, WORDS, RESPONSE_TOKENS = 64, 8, 24
LR, KL_COEF, VALUE_COEF, CLIP = 5e-5, 0.05, 0.1, 0.2
SYSTEMS = {"heeler": "Heeler", "trl": "TRL 1.12.0"}
LAST = 5  # updates at the end whose rewards are averaged


def heeler_run(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Reward and KL of every update, by Heeler."""
    from heeler import TextConfig, train_text
    from heeler.policies.language_model import Full, SeparateCritic
    from heeler.ppo.advantages import AdvantageConfig
    from heeler.ppo.kl import FixedKL
    from heeler.ppo.schedules import Schedule
    from heeler.ppo.update import PPOConfig
    from heeler.types import Sampling

    told: dict[str, list[float]] = {"logit": [], "probability": [], "kl": [], "seconds": []}

    def after_update(report: Any) -> None:
        of = {"logit": "reward/mean", "probability": "reward/probability", "kl": "kl/ref"}
        for name, key in of.items():
            told[name].append(report.metrics[key])
        told["seconds"].append(sum(report.metrics[f"time/{stage}"] for stage in ("rollout", "score", "update")))

    config = TextConfig(
        model=job["model"], reward=job["classifier"], out=str(folder / "run"), seed=job["seed"],
        updates=job["updates"], prompts_per_update=BATCH, sampling=Sampling(max_new_tokens=RESPONSE_TOKENS),
        trainable=Full(), critic=SeparateCritic(), kl=FixedKL(coef=KL_COEF), lr=LR, critic_lr=LR,
        lr_schedule=Schedule(shape="linear"), adam_betas=(0.9, 0.999), advantage=AdvantageConfig(gamma=1.0, lam=0.95),
        ppo=PPOConfig(epochs=1, minibatches=1, value_coef=VALUE_COEF, value_clip=CLIP, clip_range=CLIP,
                      max_grad_norm=1e9),  # TRL does not clip gradients
        device="cpu", threads=job["threads"], checkpoint_every=1000,
    )  # fmt: skip
    train_text(config, prompts=job["prompts"], on_update=after_update, show=False)
    return told


def trl_run(job: dict[str, Any]) -> dict[str, Any]:
    """The same by TRL, from the calls of its reward model."""
    script = str(Path(__file__).resolve().with_name("trl_update.py"))
    result = in_process([trl_python(), script], job)
    return {
        "logit": [logit for logit, _ in result["scores"]],
        "probability": [probability for _, probability in result["scores"]],
        "kl": result["kl"],
        "seconds": result["seconds"],
    }


def measure(system: str, seed: int, arguments: argparse.Namespace, common: dict[str, Any]) -> dict[str, Any]:
    job = common | {
        "seed": seed, "updates": arguments.updates, "threads": arguments.threads, "batch": BATCH, "rows": 16,
        "lr": LR, "kl_coef": KL_COEF, "response_tokens": RESPONSE_TOKENS,
    }  # fmt: skip
    if system == "trl":
        told = trl_run(job)
    else:
        told = in_process([sys.executable, str(Path(__file__).resolve()), "--child"], job)
    print(
        f"{system}, seed {seed}: probability {told['probability'][0]:.3f} -> {told['probability'][-1]:.3f}", flush=True
    )
    return {"system": system, "seed": seed, "updates": arguments.updates, "hardware": hardware(), **told}


def page(runs: list[dict[str, Any]]) -> str:
    updates = runs[0]["updates"]
    machines = sorted({run["hardware"] for run in runs})
    lines = [
        "# The same learning as TRL",
        "",
        f"Made by `python benchmarks/trl_learning.py --updates {updates}` on {'; '.join(machines)}.",
        "SmolLM2-135M, all weights, a critic and a frozen reference of the same size, 64 prompts with 24 tokens an"
        f" update, 1 epoch of 1 minibatch; reward: the demo's reward model; rate {LR:g} falling to 0, KL coefficient"
        f" {KL_COEF:g}, no clipping of gradients, for both. TRL in fp32, Heeler in the precision that it chooses.",
        "",
        f"| system | seeds | reward of the first update | mean of the last {LAST} | each | KL at the end, nats |",
        "|---|---|---|---|---|---|",
    ]
    for system, title in SYSTEMS.items():
        mine = [run for run in runs if run["system"] == system]
        if not mine:
            continue
        last = [mean(run["probability"][-LAST:]) for run in mine]
        spread = f" ± {stdev(last):.3f}" if len(last) > 1 else ""
        lines.append(
            f"| {title} | {len(mine)} | {mean(run['probability'][0] for run in mine):.3f} | {mean(last):.3f}{spread} |"
            f" {', '.join(f'{x:.3f}' for x in last)} | {mean(mean(run['kl'][-LAST:]) for run in mine):.2f} |"
        )
    lines += ["", "The reward is the probability of positive, mean of the rollouts of an update.", ""]
    lines += ["![Reward over the updates, a line a seed](../images/trl_learning.png)", ""]
    return "\n".join(lines)


def picture(runs: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.5), layout="constrained")
    colours = {"heeler": "tab:blue", "trl": "tab:orange"}
    for run in runs:
        name = SYSTEMS[run["system"]] if run["seed"] == min(r["seed"] for r in runs) else None
        axis.plot(range(1, run["updates"] + 1), run["probability"], color=colours[run["system"]], label=name, alpha=0.8)
    axis.set(xlabel="PPO update", ylabel="reward: probability of positive")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(PICTURE, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1, help="of each process (1)")
    parser.add_argument("--parallel", type=int, default=2, help="processes side by side (2)")
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--collect-only", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("files", type=Path, nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        given, wanted = arguments.files
        wanted.write_text(json.dumps(heeler_run(json.loads(given.read_text(encoding="utf-8")), given.parent)))
        return
    runs: list[dict[str, Any]] = json.loads(DATA.read_text())["runs"] if DATA.exists() else []
    if not arguments.collect_only:
        from heeler.data.reviews import review_openings
        from heeler.recipes.imdb import imdb_reward_model, smollm2_folder

        common = {
            "model": str(smollm2_folder(show=False)),
            "classifier": str(imdb_reward_model(show=False)[0]),
            "prompts": review_openings("prompts", BATCH * arguments.updates, WORDS),
        }
        known = {(run["system"], run["seed"], run["updates"]) for run in runs}
        jobs = [(system, seed) for seed in arguments.seeds for system in reversed(arguments.systems)]
        wanted = [job for job in jobs if (*job, arguments.updates) not in known]
        with ThreadPoolExecutor(arguments.parallel) as pool:
            for run in pool.map(lambda job: measure(*job, arguments, common), wanted):
                runs.append(run)
                rows = ",\n".join(json.dumps(r) for r in sorted(runs, key=lambda r: (r["system"], r["seed"])))
                DATA.write_text(f'{{"runs": [\n{rows}\n]}}\n')
    runs = sorted((run for run in runs if run["updates"] == arguments.updates), key=lambda r: (r["system"], r["seed"]))
    if not runs:
        sys.exit("no run yet")
    picture(runs)
    PAGE.write_text(page(runs), encoding="utf-8")
    print(page(runs))


if __name__ == "__main__":
    main()

"""Seconds of one PPO update of a 135M language model, Heeler beside TRL on the same machine in the same run.

    python benchmarks/update_speed.py [--skip-trl] [--out docs/benchmarks/update_speed.md]

One update is 64 prompts (the first 8 words of reviews) with 24 sampled tokens each, on SmolLM2-135M. Every system runs
in a process of its own, one after the other, and the whole round is repeated, so that what else the machine does hits
all of them alike. TRL gets an environment of its own in the user's cache, made at the first call.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # this checkout is measured, installed or not

from growth import SHAPES, machine  # noqa: E402
from pages import hardware  # noqa: E402

TORCH, TRL = "2.13.0", "1.12.0"
PROMPTS, WORDS, RESPONSE_TOKENS = 64, 8, 24
LR, KL_COEF = 3e-6, 0.05  # TRL's defaults, for all: the weights and the lengths of responses hardly change
WARM_UP = 1
VOCABULARY = 49152


@dataclass(frozen=True)
class System:
    """One row of the table.

    Attributes:
        key: short name.
        name: what the table calls it.
        updates: in one process, the warm-up included.
        rows: (TRL) sequences in one forward and backward pass; 0 for Heeler.
        bf16: (TRL) train under autocast to bf16; Heeler chooses for itself.
        full: (Heeler) train all weights; else the top layers.
        separate_critic: (Heeler) a critic model of its own; else the value head.
        reward_model: (Heeler) score with a classifier of the policy's size; else with a function.
        epochs, minibatches: of an update.
    """

    key: str
    name: str
    updates: int = WARM_UP + 3
    rows: int = 0
    bf16: bool = False
    full: bool = True
    separate_critic: bool = False
    reward_model: bool = False
    epochs: int = 1
    minibatches: int = 1


HEELER = (
    System("b", "Heeler, all weights, critic and reward models of 135M", separate_critic=True, reward_model=True),
    System("c", "Heeler, all weights, value head, reward function"),
    System("d", "Heeler, top 6 layers, value head, reward function", full=False),
    System(
        "e", "Heeler, the same as (d), 2 epochs of 2 minibatches (the demo)", full=False, epochs=2, minibatches=2
    ),
)  # fmt: skip


def trl_system(rows: int, timed: int, bf16: bool) -> System:
    passes = f"{PROMPTS // rows} passes of {rows} rows" if rows < PROMPTS else "one pass"
    name = f"TRL {TRL}, all weights, critic and reward models of 135M, {passes}"
    return System(f"a{rows}{'bf16' * bf16}", name, updates=WARM_UP + timed, rows=rows, bf16=bf16)


def operations(system: System, prompt_tokens: int, tokens: float, top_layers: int) -> float:
    """Operations of the matrix products that the algorithm needs for one update, those of attention left out.

    The old policy's log-probabilities come with sampling; a frozen trunk's states too. Backward passes count twice;
    an output layer that is not trained needs one product in them, not two.
    """
    shape = SHAPES["135M"]
    whole, head = 2.0 * shape.layer_weights, 2.0 * VOCABULARY * shape.hidden  # of one token
    trained = whole if system.full else whole * top_layers / shape.layers
    fed = prompt_tokens + tokens - PROMPTS  # the last token of a sequence predicts nothing
    sampling = whole * fed + head * tokens
    scoring = trained * fed + head * tokens + whole * fed * system.separate_critic + whole * fed * system.reward_model
    training = 3 * trained * fed * (1 + system.separate_critic) + (3 if system.full else 2) * head * tokens
    return sampling + scoring + system.epochs * training


# the processes ------------------------------------------------------------------------------------------------


def prepare(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Prompts, the policy's folder, and a reward model of the same size with a random head."""
    import torch

    from heeler.runtime.machine import choose_precision

    torch.set_num_threads(job["threads"])
    precision, _ = choose_precision("auto", "cpu")  # Heeler's
    rate, _ = machine(precision)
    from heeler.data.reviews import review_openings
    from heeler.policies.loading import load_classifier, load_tokenizer
    from heeler.recipes.imdb import smollm2_folder

    prompts = review_openings("prompts", PROMPTS, WORDS)
    if job["tiny"]:
        from tests.tiny import save_tiny_model

        words = sorted({word for prompt in prompts for word in prompt.split()})
        model = save_tiny_model(folder / "tiny", words=words, hidden=64, layers=2)
    else:
        model = str(smollm2_folder(show=False))
    torch.manual_seed(0)
    classifier, tokenizer = load_classifier(model, num_labels=1), load_tokenizer(model)
    tokenizer.pad_token = tokenizer.unk_token
    classifier.config.pad_token_id = tokenizer.pad_token_id
    classifier.save_pretrained(folder / "reward")
    tokenizer.save_pretrained(folder / "reward")
    return {"prompts": prompts, "model": model, "reward": str(folder / "reward"), "rate": [rate, precision]}


def share_of_e(completions: list[str], **_: Any) -> list[float]:
    """A reward that costs nothing: the share of the letter e."""
    return [text.count("e") / max(len(text), 1) for text in completions]


class Measured(Exception):
    """Raised after the last update: the checkpoint and the export that follow are not measured."""


def heeler_updates(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Time the updates of one of Heeler's systems."""
    from importlib.metadata import version

    import torch

    import heeler
    from heeler import TextConfig, train_text
    from heeler.policies.language_model import Full, SeparateCritic, TopLayers, ValueHead
    from heeler.ppo.advantages import AdvantageConfig
    from heeler.ppo.kl import FixedKL
    from heeler.ppo.update import PPOConfig
    from heeler.runtime.machine import peak_memory_gib
    from heeler.types import Sampling

    figures: dict[str, list[float]] = {
        name: [] for name in ("seconds", "rollout", "score", "update", "tokens", "peak_gib")
    }
    prompt_tokens: set[int] = set()

    def after_update(report: Any) -> None:
        stages = {name: report.metrics[f"time/{name}"] for name in ("rollout", "score", "update")}
        rollout = report.scored.rollout
        tokens = len(rollout.actions)
        prompt_tokens.add(int(rollout.inputs.lengths.sum()) - tokens)
        for name, value in {
            "seconds": sum(stages.values()), "tokens": tokens, "peak_gib": peak_memory_gib(), **stages
        }.items():  # fmt: skip
            figures[name].append(value)
        if len(figures["seconds"]) == job["updates"]:
            raise Measured

    config = TextConfig(
        model=job["model"],
        reward=job["reward"] if job["reward_model"] else "",
        out=str(folder / "run"),
        updates=job["updates"],
        prompts_per_update=len(job["prompts"]),
        sampling=Sampling(max_new_tokens=job["response_tokens"]),
        trainable=Full() if job["full"] else TopLayers(layers=job["top_layers"]),
        critic=SeparateCritic() if job["separate_critic"] else ValueHead(),
        kl=FixedKL(coef=job["kl_coef"]),
        lr=job["lr"],
        critic_lr=job["lr"],
        advantage=AdvantageConfig(gamma=1.0, lam=0.95),
        ppo=PPOConfig(epochs=job["epochs"], minibatches=job["minibatches"]),
        device="cpu",
        threads=job["threads"],
        checkpoint_every=1000,
        **job.get("options", {}),
    )
    if "token_budget" in job:
        config = replace(config, ppo=replace(config.ppo, token_budget=job["token_budget"]))
    try:
        reward = None if job["reward_model"] else share_of_e
        train_text(config, prompts=job["prompts"], reward=reward, on_update=after_update, show=False)
    except Measured:
        pass
    (tokens_of_prompts,) = prompt_tokens
    resolved = json.loads((folder / "run" / "config.json").read_text(encoding="utf-8"))["resolved"]
    packages = ("torch", "transformers", "tokenizers", "numpy")
    return {
        **figures,
        "prompt_tokens": tokens_of_prompts,
        "precision": resolved["precision"],
        "threads": torch.get_num_threads(),
        "versions": {
            "heeler": heeler.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
    }


def in_process(command: list[str], job: dict[str, Any]) -> dict[str, Any]:
    """Run a command with a job file and a result file; its output is shown only where it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    with tempfile.TemporaryDirectory(prefix="update-speed-") as name:
        folder = Path(name)
        given, wanted, log = folder / "job.json", folder / "result.json", folder / "log.txt"
        given.write_text(json.dumps(job), encoding="utf-8")
        with log.open("w", encoding="utf-8") as output:
            status = subprocess.run(
                [*command, str(given), str(wanted)], cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
            ).returncode
        if status != 0 or not wanted.exists():
            tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-30:])
            raise SystemExit(f"{tail}\n\nthe process ended with status {status}")
        return json.loads(wanted.read_text(encoding="utf-8"))


def this_script(kind: str) -> list[str]:
    return [sys.executable, str(Path(__file__).resolve()), "--child", kind]


def trl_python() -> str:
    """The Python of TRL's environment, which is made where it is missing."""
    from heeler.runtime.cache import cache_folder

    folder = cache_folder() / "peers" / f"trl-{TRL}"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not (folder / ".installed").exists():
        print(f"making an environment for TRL {TRL} (once)", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        for package in (f"torch=={TORCH}", f"trl=={TRL}"):  # torch first, so that TRL does not choose another one
            install = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check", package]
            subprocess.run(install, check=True)
        (folder / ".installed").touch()
    return str(python)


# the report ---------------------------------------------------------------------------------------------------


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def timed(results: list[dict[str, Any]], figure: str) -> list[float]:
    """A figure of every update of all processes of a system, without their warm-ups."""
    return [value for result in results for value in result[figure][WARM_UP:]]


def table(
    measured: list[tuple[System, list[dict[str, Any]]]], peer: str | None, rate: float, top_layers: int
) -> list[str]:
    of = {system.key: results for system, results in measured}
    head = (
        "system", "precision", "seconds an update, median", "least", "response tokens/s", "rollout", "score", "update",
        "peak memory, GiB", "times as fast as TRL, by medians", "by least", "floor, s",
    )  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
    for system, results in measured:
        seconds, tokens = timed(results, "seconds"), timed(results, "tokens")
        cells = [
            f"({system.key[0]}) {system.name}",
            results[0]["precision"],
            f"{median(seconds):.2f}",
            f"{min(seconds):.2f}",
            f"{median(t / s for t, s in zip(tokens, seconds, strict=True)):.0f}",
            *(f"{median(timed(results, stage)):.2f}" for stage in ("rollout", "score", "update")),
            f"{max(max(result['peak_gib']) for result in results):.2f}",
        ]
        if peer is None:
            cells += ["", ""]
        else:
            theirs = timed(of[peer], "seconds")
            cells += [f"{median(theirs) / median(seconds):.1f}", f"{min(theirs) / min(seconds):.1f}"]
        needed = system if not system.rows else HEELER[0]  # TRL does what (b) does
        work = operations(needed, results[0]["prompt_tokens"], median(tokens), top_layers)
        cells.append(f"{work / rate:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def report(
    arguments: argparse.Namespace,
    measured: list[tuple[System, list[dict[str, Any]]]],
    peer: str | None,
    load: float,
    speed: tuple[float, str],
    top_layers: int,
) -> str:
    """The Markdown file."""
    rate, precision = speed
    first = measured[-1][1][0]
    counts = ", ".join(
        f"({system.key[0]}) {len(timed(results, 'seconds'))}"
        + (f" with {system.rows} rows a pass{' in bf16' * system.bf16}" if system.rows else "")
        for system, results in measured
    )
    rounds = "in one round" if arguments.rounds == 1 else f"in {arguments.rounds} rounds"
    environments: dict[str, str] = {}
    for _, results in measured:
        versions = results[0]["versions"]
        owner = "TRL" if "trl" in versions else "Heeler"
        environments[owner] = ", ".join(f"{name} {number}" for name, number in versions.items())
    options = "".join(
        f" {option}"
        for option, given in (
            ("--tiny", arguments.tiny),
            ("--skip-trl", arguments.skip_trl),
            (f"--rounds {arguments.rounds}", arguments.rounds != 2),
            (f"--threads {arguments.threads}", arguments.threads != cores()),
            (f"--trl-timed {arguments.trl_timed}", arguments.trl_timed != 2),
            (f"--trl-rows {' '.join(map(str, arguments.trl_rows))}", arguments.trl_rows != [16, 32]),
        )
        if given
    )
    model = "a tiny model with random weights (a trial of the script, no result)" if arguments.tiny else "SmolLM2-135M"
    lines = [
        "# Seconds of one PPO update, beside TRL",
        "",
        f"{model}; one update is {PROMPTS} prompts (the first {WORDS} words of reviews, {first['prompt_tokens']} tokens"
        f" together) with {RESPONSE_TOKENS} sampled tokens each; 1 epoch and 1 minibatch unless the table says"
        " otherwise. All systems continue the same prompts in every update, at temperature 1.",
        "",
        f"    python benchmarks/update_speed.py{options}",
        "",
        f"- Machine: {hardware()}. Threads: {first['threads']}. Load average before the start: {load:.1f}.",
        *(f"- {owner}: {versions}." for owner, versions in environments.items()),
        "",
        *table(measured, peer, rate, top_layers),
        "",
        f"Each system ran in processes of its own, one after the other, {rounds}; every process"
        f" began with {WARM_UP} update that is not counted. Counted updates: {counts}. Stages are medians too, in"
        " seconds; they need not add up to the median of the whole. *rollout* is sampling; *score* is rewards, the"
        " reference's log-probabilities, values and advantages (Heeler in bf16: also the old log-probabilities, which"
        " come with sampling in fp32); *update* is"
        " everything with gradients and the optimiser. Peak memory is the resident memory of the process.",
        "",
        "*floor*: the operations of the matrix products that the algorithm needs, at the"
        f" {rate / 1e9:.0f} GFLOP/s of one large {precision} product on this machine. TRL's seconds over a row's floor"
        " are the most that its ratio could be here.",
        "",
        _ABOUT_TRL if peer else "TRL was not run, so there are no ratios.",
        "",
        "Heeler: checkpoints and the export are not in the times. It tells glibc to keep freed memory when it starts;"
        " TRL runs as its users start it.",
        "",
        "Figures move with the machine: compare ratios of one run, not seconds of two.",
    ]
    return "\n".join(lines) + "\n"


_ABOUT_TRL = (
    "TRL: `trl.experimental.ppo.PPOTrainer`, with a frozen reference, a critic and a reward model"
    " (`AutoModelForSequenceClassification`, one label) from the same folder; no gradient checkpointing, no sample"
    " tables, no saving, no missing-EOS penalty. Of its precisions (`bf16=True` is autocast over weights in fp32) and"
    " numbers of rows in a pass, each ran in the first round and the fastest went on; the ratios compare with that one."
)


def measure(arguments: argparse.Namespace) -> str:
    """Run everything and return the report."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    peer_python = "" if arguments.skip_trl else trl_python()
    with tempfile.TemporaryDirectory(prefix="update-speed-") as shared:
        made = in_process(
            this_script("prepare"), {"tiny": arguments.tiny, "folder": shared, "threads": arguments.threads}
        )
        common = made | {
            "response_tokens": RESPONSE_TOKENS, "lr": LR, "kl_coef": KL_COEF, "threads": arguments.threads,
            "top_layers": 1 if arguments.tiny else 6,
        }  # fmt: skip
        settings = [(rows, bf16) for rows in arguments.trl_rows for bf16 in (False, True)]
        peers = [] if arguments.skip_trl else [trl_system(rows, arguments.trl_timed, bf16) for rows, bf16 in settings]
        results: dict[str, list[dict[str, Any]]] = {system.key: [] for system in (*peers, *HEELER)}

        def fastest() -> System:
            return min(peers, key=lambda system: median(timed(results[system.key], "seconds")))

        for number in range(arguments.rounds):
            chosen = peers if number == 0 or not peers else [fastest()]
            for system in (*chosen, *HEELER):
                script = str(Path(__file__).resolve().with_name("trl_update.py"))
                command = [peer_python, script] if system.rows else this_script("heeler")
                try:
                    result = in_process(command, common | vars(system))
                except SystemExit as error:
                    if system not in peers or len(peers) == 1:
                        raise
                    print(f"left out: {system.name}: {str(error).splitlines()[-1]}", flush=True)  # out of memory?
                    peers.remove(system)
                    results.pop(system.key)
                    continue
                results[system.key].append(result)
                seconds = ", ".join(f"{s:.2f}" for s in result["seconds"])
                print(f"round {number + 1}, ({system.key}) {system.name}: {seconds} s", flush=True)
    totals = {result["prompt_tokens"] for each in results.values() for result in each}
    if len(totals) != 1:
        raise SystemExit(f"the systems read different prompts: {sorted(totals)} tokens")
    measured = [(system, results[system.key]) for system in (*peers, *HEELER)]
    chosen = fastest().key if peers else None
    return report(arguments, measured, chosen, load, made["rate"], common["top_layers"])


def child(kind: str, given: Path, wanted: Path) -> None:
    """What a process of this script does."""
    job = json.loads(given.read_text(encoding="utf-8"))
    result = prepare(job, Path(job["folder"])) if kind == "prepare" else heeler_updates(job, given.parent)
    wanted.write_text(json.dumps(result), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--skip-trl", action="store_true", help="time Heeler alone")
    parser.add_argument("--out", type=Path, help="the Markdown file (docs/benchmarks/update_speed.md)")
    parser.add_argument("--rounds", type=int, default=2, help="how often each system runs (2)")
    parser.add_argument("--trl-timed", type=int, default=2, help="counted updates of TRL in each round (2)")
    parser.add_argument("--threads", type=int, default=cores(), help="CPU threads of each system (all)")
    parser.add_argument(
        "--trl-rows", type=int, nargs="+", default=[16, 32], help="rows in one pass of TRL: the fastest counts (16 32)"
    )
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # a trial of this script
    parser.add_argument("--child", choices=("prepare", "heeler"), help=argparse.SUPPRESS)
    parser.add_argument("files", type=Path, nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, *arguments.files)
        return
    if arguments.rounds < 1 or any(rows < 1 or PROMPTS % rows for rows in arguments.trl_rows):
        parser.error(f"--rounds must be at least 1, and each of --trl-rows must divide {PROMPTS}")
    text = measure(arguments)
    out: Path | None = arguments.out
    if out is None and not arguments.tiny:
        out = ROOT / "docs" / "benchmarks" / "update_speed.md"
    print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

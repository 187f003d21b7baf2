"""What a person sees at the end of a run: the figures before and after, and texts side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heeler.data.prompts import load_prompts
from heeler.policies import loading
from heeler.types import Sampling

if TYPE_CHECKING:
    from heeler.policies.token_masks import TokenMask
    from heeler.train.text import TextConfig

ORDER = (
    "reward", "reward_score", "judge", "judge_words", "perplexity", "distinct_2", "distinct_2_within", "duplicates",
    "length", "truncated_fraction", "kl/ref",
)  # fmt: skip


def figures_table(columns: Mapping[str, Mapping[str, float]]) -> str:
    """An aligned table, one row a figure, one column an evaluation."""
    names = list(dict.fromkeys([n for n in ORDER if any(n in c for c in columns.values())]
                               + [n for c in columns.values() for n in c]))  # fmt: skip
    widths = [max(len(title), 10) for title in columns]
    lines = [" " * 20 + "".join(f"  {title:>{w}}" for title, w in zip(columns, widths, strict=True))]
    for name in names:
        cells = [f"{c[name]:z.3f}" if name in c else "-" for c in columns.values()]
        lines.append(f"{name:<20}" + "".join(f"  {cell:>{w}}" for cell, w in zip(cells, widths, strict=True)))
    return "\n".join(lines)


def print_report(run: Any) -> None:
    """The summary of a finished run, on standard output."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    summary, console = run.summary, Console()
    columns = {t: summary[f"eval/{t}"] for t in ("before", "after") if f"eval/{t}" in summary}
    if columns:
        print(f"\nHeld-out prompts: {len(run.eval_prompts)}")
        print(figures_table(columns))
    examples = [e for e in summary.get("eval/examples", []) if "after" in e][:4]
    if examples:
        table = Table(title="The same prompts and the same draws, before and after", show_lines=True)
        for title in ("prompt", "before", "after"):
            table.add_column(title, ratio=1)
        for e in examples:
            prompt = e["prompt"] if isinstance(e["prompt"], str) else e["prompt"][-1]["content"]
            cells = [f"{e[t].strip()}  [{e[f'reward/{t}']:.2f}]" for t in ("before", "after")]
            table.add_row(Text(prompt), *[Text(c) for c in cells])
        console.print(table)
    folder = run.folder.path
    print(
        f"{summary['updates']} updates, {summary.get('seconds/ppo', 0):.0f} s of PPO, peak"
        f" {summary['peak_memory_gib']} GiB"
    )
    print(f"{folder}/summary.json has the figures; {folder}/policy is a plain transformers folder; try:")
    print(f'  heeler sample {folder} --prompt "The film"')


def stopped_run(path: str) -> tuple[int, TextConfig] | None:
    """The last checkpoint and the config of a PPO run that was stopped before it exported its policy; else None."""
    from heeler.runtime.configs import from_json
    from heeler.runtime.runs import RunFolder, read_json

    file = Path(path) / "config.json"
    verb = read_json(file).get("verb") if file.is_file() else None
    step = RunFolder(Path(path)).last_checkpoint()
    if verb not in ("ppo lm", "ppo dialogue") or step is None or (Path(path) / "policy" / "config.json").is_file():
        return None
    from heeler.train.dialogue import DialogueConfig
    from heeler.train.text import TextConfig

    return step, from_json(TextConfig if verb == "ppo lm" else DialogueConfig, read_json(file)["config"], str(file))


def sampling_of_run(path: str) -> tuple[TokenMask, tuple[str, ...]]:
    """The token mask and the stop strings of the PPO run whose folder, or whose `policy/`, this is; else none."""
    from heeler.policies.token_masks import AllTokens
    from heeler.runtime.configs import from_json
    from heeler.runtime.runs import read_json
    from heeler.train.text import TextConfig

    folder = Path(path)
    policy = folder.resolve().name == "policy"  # RUN/policy, or RUN/best/policy
    for place in (folder, *folder.resolve().parents[:2]) if policy else (folder,):
        file = place / "config.json"
        saved = read_json(file) if file.is_file() else {}
        if saved.get("verb") in ("ppo lm", "ppo dialogue"):
            chosen = {key: value for key, value in saved["config"].items() if key in ("model", "tokens", "sampling")}
            config: TextConfig = from_json(TextConfig, chosen, str(file))
            return config.tokens, config.sampling.stop
    return AllTokens(), ()


def load_checkpoint_model(path: str, step: int, config: TextConfig) -> Any:
    """The model that a run would export from a checkpoint. It needs neither the run's prompts nor its reward."""
    from heeler.policies.language_model import LanguageModelPolicy
    from heeler.policies.seq2seq import Seq2SeqPolicy
    from heeler.runtime.runs import RunFolder

    folder = RunFolder.open(path)
    model = loading.load_language_model(config.model)
    policy = (Seq2SeqPolicy if model.config.is_encoder_decoder else LanguageModelPolicy)(
        model, trainable=config.trainable, critic=config.critic, precision=folder.read_config()["resolved"]["precision"]
    )
    policy.load_state_dict(folder.load_checkpoint(step)["weights"])
    return policy.export_model().eval()


def sample_model(path: str, command: Any) -> list[str]:
    """Completions by a run's policy, or by any model; by the last checkpoint of a run that was stopped.

    A run's policy is kept to the tokens that the run kept it to, and ends where the run's completions ended.
    """
    from heeler.policies.token_masks import token_bias
    from heeler.rollout.engines.draws import GREEDY, draw_seed
    from heeler.rollout.engines.native import native_engine
    from heeler.rollout.text import decode
    from heeler.runtime import machine
    from heeler.train.run import at_least
    from heeler.types import HeelerError, Request

    at_least(
        {
            "--temperature": (command.temperature, 0),
            "--max-new-tokens": (command.max_new_tokens, 1),
            "--top-k": (command.top_k, 0),
        }
    )
    if not 0 < command.top_p <= 1:
        raise HeelerError(f"--top-p must be above 0 and at most 1, not {command.top_p}")
    machine.keep_freed_memory()
    machine.set_threads(None)
    stopped = stopped_run(path)
    tokenizer = loading.load_tokenizer(path if stopped is None else stopped[1].model)
    model = loading.load_language_model(path) if stopped is None else load_checkpoint_model(path, *stopped)
    source = [[{"role": "user", "content": p}] if command.chat else p for p in command.prompt]
    room = loading.prompt_room(model, command.max_new_tokens)
    prompts = load_prompts(source, tokenizer, max_tokens=room)
    tokens, stop = sampling_of_run(path)
    eos_ids = loading.end_of_sequence_ids(model, tokenizer)
    bias = token_bias(tokens, tokenizer, int(model.get_output_embeddings().weight.shape[0]), eos_ids)
    engine = native_engine(model, eos_ids=eos_ids, token_bias=bias, tokenizer=tokenizer)
    requests = [Request(prompt=t, seed=draw_seed(command.seed, i)) for i, t in enumerate(prompts.tokens)]
    sampling = Sampling(
        max_new_tokens=command.max_new_tokens,
        temperature=command.temperature or GREEDY,
        top_k=command.top_k,
        top_p=command.top_p,
        stop=stop,
    )
    return [decode(tokenizer, completion) for completion in engine.generate(requests, sampling)]

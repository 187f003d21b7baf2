"""What a person sees at the end of a run: the figures before and after, and texts side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from heeler.data.prompts import load_prompts
from heeler.policies import loading
from heeler.types import Sampling

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


def sample_model(path: str, command: Any) -> list[str]:
    """Completions by a run's policy, or by any model."""
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
    tokenizer, model = loading.load_tokenizer(path), loading.load_language_model(path)
    source = [[{"role": "user", "content": p}] if command.chat else p for p in command.prompt]
    room = loading.prompt_room(model, command.max_new_tokens)
    prompts = load_prompts(source, tokenizer, max_tokens=room)
    engine = native_engine(model, eos_ids=loading.end_of_sequence_ids(model, tokenizer))
    requests = [Request(prompt=t, seed=draw_seed(command.seed, i)) for i, t in enumerate(prompts.tokens)]
    sampling = Sampling(
        max_new_tokens=command.max_new_tokens,
        temperature=command.temperature or GREEDY,
        top_k=command.top_k,
        top_p=command.top_p,
    )
    return [decode(tokenizer, completion) for completion in engine.generate(requests, sampling)]

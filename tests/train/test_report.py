"""`heeler sample` on a run's folder: what was learnt is sampled as the run sampled it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from heeler import train_text
from heeler.policies.token_masks import OnlyTokens
from tests.runs import small
from tests.train.test_text import vowels


@pytest.mark.parametrize("stopped", [False, True])
def test_samples_are_kept_to_the_runs_tokens_and_stops(
    tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, stopped: bool
) -> None:
    from heeler.cli import main

    def texts(folder: str) -> list[str]:
        words = [word for i in range(8) for word in ("--prompt", f"x{i}=")]
        assert main(["sample", folder, *words, "--max-new-tokens", "9"]) == 0
        return [line.partition("=")[2] for line in capsys.readouterr().out.splitlines() if "=" in line]

    monkeypatch.chdir(tmp_path)
    config = small(tiny_llama, Path("run"), updates=1, tokens=OnlyTokens(texts=("a", "b", "c")))
    config = replace(config, sampling=replace(config.sampling, stop=("c",)))

    def stop(report: Any) -> None:
        raise KeyboardInterrupt

    if stopped:
        with pytest.raises(KeyboardInterrupt):
            train_text(config, prompts=["ab"], reward=vowels, on_update=stop, show=False)
    else:
        train_text(config, prompts=["ab"], reward=vowels, show=False)
    written = texts("run")
    assert len(written) == 8 and set("".join(written)) == {"a", "b"}
    assert len(set(map(len, written))) > 1  # some met a "c"
    if not stopped:
        assert texts("run/policy") == written
        monkeypatch.chdir("run/policy")
        assert texts(".") == written
        monkeypatch.chdir(tmp_path)
        shutil.copytree("run/policy", "elsewhere")
        assert not set("".join(texts("elsewhere"))) <= {"a", "b", "c"}  # there the run is not known

"""The GPU benchmark's logic, on a CPU with a tiny model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import gpu


def test_the_whole_script_on_a_tiny_model(tmp_path: Path) -> None:
    out = tmp_path / "gpu.md"
    gpu.main(["--tiny", "--device", "cpu", "--out", str(out), "--peak-tflops", "1"])
    text = out.read_text()
    assert "trial" in text and re.search(r"\| Heeler, native \| \d+ \| 1\.0 \|", text)
    assert re.search(r"\| transformers' generate \| \d+ \| [\d.]+ \|", text)
    assert re.search(r"\| torch's operations between the products \| [\d.]+ \|", text) and "fused by" not in text
    same = re.search(r"\| fp32 \| (\S+) \| (\S+) \|", text)
    rough = re.search(r"\| bf16 \| (\S+) \| (\S+) \|", text)
    assert same and rough and float(same[2]) < 1e-4 < float(rough[2]) < 1


def test_operations_of_an_update(tmp_path: Path) -> None:
    folder = gpu.save_model(gpu.TINY, tmp_path)
    found = gpu.update(gpu.TINY, folder, "cpu", "fp32")
    tokens = 4 * (8 + 8 - 1)
    weights = 257 * 32 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32) + 32
    assert found["tokens"] == tokens and found["update"] > 0
    pairs = 4 * 15 * 16 / 2  # of a query and a key, in all sequences
    assert found["operations"] == 6 * weights * tokens + 3 * 4 * 2 * 32 * pairs


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--device", "cpu"])
    assert stopped.value.code == 2 and "there is no GPU here" in capsys.readouterr().err

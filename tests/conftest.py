from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: a missing model is then missed at once

import pytest
import torch

from tests.tiny import save_tiny_model

COUNT_WORDS = [str(i) for i in range(10)] + ["go"]


def pytest_configure() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests press Ctrl-C; a shell's background ignores it


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny networks want one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Llama that reads bytes."""
    return save_tiny_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def count_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Llama over the digits and a start word, nearly uniform at first."""
    folder: Path = tmp_path_factory.mktemp("count")
    return save_tiny_model(folder, words=COUNT_WORDS, hidden=64, layers=2, std=0.05)

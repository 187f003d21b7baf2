"""A process that answers a verifier's questions and is killed where one takes too long."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from heeler.types import HeelerError

START = 120.0  # seconds for packages to be imported and tasks to be made


class Worker:
    """The process of one verifier; started at the first question, and again after one that took too long.

    No signal handler is involved, so that it works from any thread and stops a long operation in C.

    Args:
        verifier: which of `worker_script.ANSWERS` answers.
        timeout: seconds for one question.
        trial: a question that is asked at each start; 120 seconds are enough for it, since packages are imported.
        wanted: its answer.
    """

    def __init__(self, verifier: str, timeout: float, trial: dict[str, Any], wanted: dict[str, Any]) -> None:
        if not 0 < timeout <= threading.TIMEOUT_MAX:
            raise HeelerError(f"the time limit of the verifier {verifier} must be above 0 seconds, not {timeout:g}")
        self.verifier, self.timeout, self.trial, self.wanted = verifier, timeout, trial, wanted
        self.process: subprocess.Popen[str] | None = None
        self.prepared: set[str] = set()
        self.stop: Callable[[], object] = lambda: None
        self.lock = threading.Lock()

    def ask(self, question: dict[str, Any], first: dict[str, Any] | None = None) -> dict[str, Any] | None:
        """The answer; None where `timeout` seconds were not enough, or the process died of the question.

        `first` is asked before it, once for each process, and has 120 seconds.
        """
        with self.lock:
            process = self.process or self._start()
            answer = None
            try:
                key = json.dumps(first)
                if first is not None and key not in self.prepared:
                    _exchange(process, first, START)
                    self.prepared.add(key)
                answer = _exchange(process, question, self.timeout)
            finally:
                if answer is None:  # also where an interrupt has left an answer unread
                    self.stop()
                    self.process = None
        return answer

    def _start(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("worker_script.py")), self.verifier],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="utf-8",
            start_new_session=True,  # an interrupt at the keyboard is for the run, which still scores its last samples
        )  # fmt: skip
        self.stop = weakref.finalize(self, _stop, process)
        if _exchange(process, self.trial, START) != self.wanted:
            self.stop()
            raise HeelerError(
                f"the process of the verifier {self.verifier} does not start, or answers its first question wrongly:"
                " pip install --upgrade 'heeler[verifiers]'"
            )
        self.process = process
        self.prepared.clear()
        return process


def _exchange(process: subprocess.Popen[str], question: dict[str, Any], timeout: float) -> dict[str, Any] | None:
    assert process.stdin is not None and process.stdout is not None
    text = json.dumps(question)
    timer = threading.Timer(timeout, process.kill)
    timer.start()
    try:
        process.stdin.write(text + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
    except OSError:
        return None
    finally:
        timer.cancel()
    return json.loads(line) if line.endswith("\n") else None


def _stop(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()

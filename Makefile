# Two commands need nothing but Python >= 3.11 and make: `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
OUT    ?= demo-out
JOBS   ?= auto
# Threads that spin while they wait hurt badly when cores are shared.
export OMP_WAIT_POLICY ?= PASSIVE
# Keeps the working folder off sys.path, where ./kernels would look like another project's package.
export PYTHONSAFEPATH := 1

.PHONY: dev demo test soak check bench clean
.DELETE_ON_ERROR:

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

# Folders of links that static tools read, and that run us on a machine without an install.
build/links/logitcask:
	mkdir -p $@
	for d in engine kernels cli; do ln -sfn ../../../$$d $@/$$d; done

dev: $(VENV)/.installed build/links/logitcask

demo: dev
	$(BIN)/logitcask demo --out $(OUT)

# One torch thread per worker: two cores, two workers.
test: dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist worksteal

# The long counts of the store's tests: an hour, and for one of them the right to mount a disk.
soak: dev
	OMP_NUM_THREADS=1 PYTHONSAFEPATH= $(BIN)/python bench/bench_soak.py

check: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

bench: dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[bench]"
	PYTHONSAFEPATH= $(BIN)/python bench/bench_cli.py
	PYTHONSAFEPATH= $(BIN)/python bench/bench_demo.py
	PYTHONSAFEPATH= $(BIN)/python bench/bench_store.py
	PYTHONSAFEPATH= $(BIN)/python bench/bench_kernels.py

clean:
	rm -rf build $(OUT) .pytest_cache .mypy_cache .ruff_cache .hypothesis

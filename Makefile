PYTHON ?= python3
PORT ?= 8080
BIN := .venv/bin
export AIRFLOW_HOME ?= $(CURDIR)/.local/airflow
export AIRFLOW__CORE__LOAD_EXAMPLES := False

.DELETE_ON_ERROR:
.PHONY: demo ui test test-stack test-matrix test-oldest chaos_kills chaos_random chaos_celery night bench live-check docs screenshots lint format dist clean

demo: .venv/done       ## dub a real video with a real Airflow DAG, on the HeyGen emulator
	@$(BIN)/python example_dags/run_local.py demo

ui: .venv/done         ## Airflow's web UI with the example DAGs and the emulator, at PORT
	@$(BIN)/python example_dags/run_local.py ui --port $(PORT)

test: lint             ## lint, types, tests
	$(BIN)/python -m pytest --ignore tests/stack --numprocesses 4 --dist loadfile

test-matrix:           ## the tests on every supported Airflow and Python that is on this machine
	$(PYTHON) tests/matrix.py $(CELLS)

test-oldest:           ## the tests on the oldest Airflow, with the oldest dependencies
	@$(MAKE) test-matrix CELLS=3.1-3.11

test-stack: .venv/done ## all parts of a real Airflow, also killed at the worst moments; needs PostgreSQL, Redis, Chromium
	$(BIN)/python -m pytest tests/stack --numprocesses 2 --dist loadfile
	@$(MAKE) --jobs=2 $(if $(filter output-sync,$(.FEATURES)),--output-sync) chaos_random chaos_kills chaos_celery night

# Airflow itself may run a task out of its retries when its processes are killed. In CI, one more run of that part tells
# bad luck from a defect; what the first found stays in the output.
chaos_kills chaos_random chaos_celery night: .venv/done
	$(BIN)/python -m pytest tests/stack/$@.py || { [ "$$CI" = true ] && $(BIN)/python -m pytest tests/stack/$@.py; }

bench: .venv/done .venv-bench/done  ## what importing, waiting and moving files cost, compared with other providers; 14 minutes
	.venv-bench/bin/python benchmarks/import_cost.py --runs 5
	$(BIN)/python benchmarks/media.py
	.venv-bench/bin/python benchmarks/polling.py
	$(BIN)/python benchmarks/queueing.py

live-check: .venv/done ## dub VIDEO with AUDIO on HeyGen itself, with the key in HEYGEN_API_KEY; asks first
	@$(BIN)/python tests/live_check.py $(if $(VIDEO),'$(VIDEO)') $(if $(AUDIO),'$(AUDIO)')

docs: .venv/done       ## the documentation, in .local/docs/index.html
	$(BIN)/python -m sphinx -q -W --keep-going docs .local/docs

screenshots: .venv/done ## take the documentation's pictures of the web UI; needs Chromium
	SCREENSHOTS=docs/images $(BIN)/python -m pytest tests/stack/test_web_ui.py

lint: .venv/done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/done
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

dist: .venv/done       ## wheel and sdist, checked by installing them; takes some minutes
	rm -rf dist .venv-dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*
	$(PYTHON) -m venv .venv-dist
	.venv-dist/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt dist/*.whl
	BARE_VENV=$(CURDIR)/.venv-dist $(BIN)/python -m pytest -q tests/test_packaging.py -k installed

clean:
	rm -rf .venv .venv-bench .venv-dist .matrix .local dist

.venv/done: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 to 3.14 is needed: make PYTHON=...")'
	@tests/environment.sh $(PYTHON) .venv --constraint constraints.txt --editable '.[emulator,dev]'
	@touch $@

.venv-bench/done: pyproject.toml benchmarks/peers.txt
	@tests/environment.sh $(PYTHON) .venv-bench --editable . --requirement benchmarks/peers.txt
	@touch $@

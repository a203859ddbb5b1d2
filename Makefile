# Run these in an activated virtual environment with `pip install -e '.[dev]'` in it.

.PHONY: check lint test format chaos stores

check: lint test

lint:
	.ci/lint

test:
	python -m pytest

format:
	ruff format
	ruff check --fix

# Takes half an hour or more on an otherwise idle machine. Writes the figures of docs/proof-chaos.md to build/.
# As root, BUQUET_STORM_NAMESPACES=1 cuts real network namespaces.
chaos:
	mkdir -p build
	BUQUET_STORM_TASKS=$${BUQUET_STORM_TASKS:-50000} BUQUET_STORM_RUNS=$${BUQUET_STORM_RUNS:-500} \
	BUQUET_STORM_SECONDS=$${BUQUET_STORM_SECONDS:-600} \
	BUQUET_STORM_CONCURRENCY=$${BUQUET_STORM_CONCURRENCY:-32} BUQUET_STORM_REPORT=$(CURDIR)/build/storm \
	python -m pytest tests/chaos -s

# The store contract, and a minute of kills, on the store of BUQUET_CONTRACT_URL; see docs/stores.md.
stores:
	python -m pytest tests/stores/probe.py

# A bounded search of the protocol's models, and the table of planted bugs in docs/proof.md.
.PHONY: proof planted

proof:
	cd proof && python check.py

planted:
	python -m tests.simulation.planted --jobs 2

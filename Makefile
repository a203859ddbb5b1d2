# Run these in an activated virtual environment with `pip install -e '.[dev]'` in it.

.PHONY: check lint test format

check: lint test

lint:
	.ci/lint

test:
	python -m pytest

format:
	ruff format
	ruff check --fix

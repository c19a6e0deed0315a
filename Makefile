# Everything a newcomer types. Each target makes its virtual environment when there is none,
# or when pyproject.toml is newer than the last installation.

VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
PYTHON ?= $(shell for name in python3 python3.13 python3.12 python3.11; do \
	command -v $$name >/dev/null && $$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	2>/dev/null && echo $$name && break; done)
ARGS ?=
# Files of tests go on side by side, three of them, each with a store of its own: those of whole runs
# wait a lot. Who takes which is said in tests/conftest.py.
PARALLEL ?= --numprocesses 3 --dist loadfile --no-loadscope-reorder

# Settings of the caller's shell that would change what the targets do. Without byte code every
# process of Ray compiles torch anew (twice the time to start); optimized Python drops the tests'
# asserts; the demo and the tests have a store and a Ray of their own.
unexport PYTHONDONTWRITEBYTECODE PYTHONPYCACHEPREFIX PYTHONOPTIMIZE PYTHONPATH PYTHONHOME
unexport PYTHONWARNINGS PYTHONSTARTUP PYTHONSAFEPATH VIRTUAL_ENV __PYVENV_LAUNCHER__
unexport PIP_NO_COMPILE PIP_USER PIP_TARGET PIP_PREFIX PIP_REQUIRE_VIRTUALENV PIP_CONSTRAINT
unexport AWS_PROFILE AWS_DEFAULT_PROFILE AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN
unexport AWS_ENDPOINT_URL AWS_ENDPOINT_URL_S3 AWS_REGION AWS_DEFAULT_REGION AWS_CA_BUNDLE
unexport RAY_ADDRESS RAY_JOB_CONFIG_JSON_ENV_VAR SHOAL_CACHE
# The store listens on loopback: no proxy on the way to it.
LOOPBACK := 127.0.0.1,localhost
export NO_PROXY := $(if $(NO_PROXY),$(NO_PROXY)$(shell printf ,))$(LOOPBACK)
export no_proxy := $(NO_PROXY)

.PHONY: help demo test chaos figures check manifests constraints clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo    fine-tune a real model on real data, on two workers, through an S3 store'
	@echo 'make test    run the tests                    (make test ARGS="-k stream")'
	@echo 'make chaos   what is left of runs after kills and faults: bench/ in full (an hour)'
	@echo 'make figures  the other experiments of bench/: speed, growth, searches (hours)'
	@echo 'make check   formatting, lint, types, import fences'
	@echo 'make manifests    what is in k8s/: overlays, network, alerts, image, rendered examples'
	@echo 'make constraints  k8s/constraints.txt: versions for the image, from .venv as it was tested'
	@echo 'make clean   stop the demo store; remove .venv, .shoal, .assets and all caches'

demo: $(INSTALLED)
	@$(PY) examples/demo.py $(ARGS)

test: $(INSTALLED)
	@$(PY) -m pytest $(PARALLEL) $(ARGS)

chaos: EXPERIMENTS := chaos faults elastic recovery resume checkpoint
figures: EXPERIMENTS := start stream train growth adapters search_quality search_overhead search_chaos
# One after the other: each takes all cores. All of them run, and their exit codes are joined.
chaos figures: $(INSTALLED)
	@mkdir -p build/bench; failed=; \
	for name in $(EXPERIMENTS); do \
		$(PY) bench/$$name.py --json build/bench/$$name.json $(ARGS) || failed="$$failed $$name"; \
	done; \
	[ -z "$$failed" ] || { echo "error: failed:$$failed" >&2; exit 1; }

check: $(INSTALLED)
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports

manifests: $(INSTALLED)
	@$(PY) -m pytest tests/k8s tests/cluster/test_rayjob.py $(ARGS)

constraints: $(INSTALLED)
	@$(PY) k8s/constraints.py > k8s/constraints.new && mv k8s/constraints.new k8s/constraints.txt

clean:
	@if [ -x $(VENV)/bin/shoal ] && [ -d .shoal/store ]; then \
		$(VENV)/bin/shoal down --folder .shoal/store || true; fi
	rm -rf $(VENV) .shoal .assets build dist *.egg-info .coverage
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(PY):
	@if [ -z '$(PYTHON)' ]; then \
		echo 'error: Python 3.11 or later is needed; found: '"$$(python3 --version 2>&1)" >&2; \
		echo >&2; \
		echo 'hint: name one, as in: make demo PYTHON=/path/to/python3.12' >&2; exit 2; fi
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: Python 3.11 or later is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1)" >&2; \
		echo >&2; \
		echo 'hint: name another, as in: make demo PYTHON=/path/to/python3.12' >&2; exit 2; }
	@case '$(CURDIR)' in *' '*) \
		echo 'error: the path of this checkout has a space, and Ray starts no worker from there:' >&2; \
		echo '$(CURDIR)' >&2; echo >&2; \
		echo 'hint: move the checkout' >&2; exit 2;; esac
	@$(PYTHON) -c 'import venv, ensurepip' || { \
		echo 'error: $(PYTHON) cannot make virtual environments' >&2; echo >&2; \
		echo 'hint: on Debian and Ubuntu: apt-get install python3-venv' >&2; exit 2; }
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)

$(INSTALLED): $(PY) pyproject.toml
	@echo 'Installing into $(VENV) (a few minutes, once) ...'
	@$(PY) -m pip install --quiet --disable-pip-version-check -e '.[train,local,dev]'
	@touch $@

# Everything runs in .venv, which is made on first use and again when pyproject.toml or constraints.txt changes; the
# benchmarks run in .venv-bench, where NumPyro, PyMC and scikit-learn are installed beside us, and the tests with ArviZ 1.x in
# .venv-arviz1.
#   make test ARGS="tests/guides -x"        further arguments of pytest, or of the benchmarks
#   make demo PYTHON=/path/to/python3.12    another interpreter (>= 3.11)

PYTHON ?= python3 python3.13 python3.12 python3.11 python3.14 python
ARGS ?=

# The tests marked slow take half an hour on two cores: NUTS on every real posterior, five seeds of every fit.
MARKERS := $(if $(SLOW),,-m "not slow")
ARVIZ_TESTS := tests/test_arviz_bridge.py tests/test_arviz_files.py tests/test_arviz_table.py tests/test_export.py \
    tests/test_export_bad_input.py tests/test_export_memory.py tests/test_checkpoint.py tests/test_posterior.py tests/checks/test_pareto.py
# -qq: errors only.
PIP_INSTALL = $(@D)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-arviz1 lint bench docs dist try-wheel clean

help:
	@echo 'make demo    fit eight schools two ways, run NUTS beside, write the report to demo/'
	@echo 'make test    run the tests (SLOW=1: the slow ones too; ARGS="-k word")'
	@echo 'make test-arviz1  what meets ArviZ, with its 1.x series (needs Python >= 3.12, and takes gigabytes the first time)'
	@echo 'make lint    ruff and mypy'
	@echo 'make bench   run the benchmarks (an hour and a half; ARGS="fits nuts svi vae growth stops natural_gradient bbb encoder autoencoder trust", ARGS=--quick)'
	@echo 'make docs    run every example of the docstrings, the README, docs/ and the tutorials; then build the pages in site/'
	@echo 'make dist    wheel and source distribution, checked, in dist/'
	@echo 'make try-wheel   install that wheel into an empty environment and run the README'"'"'s example there'
	@echo 'make clean   remove .venv, demo/, build products and caches'

demo: .venv/.installed
	.venv/bin/pyro-vi-lab compare eight_schools --out demo

test: .venv/.installed-test
	.venv/bin/python -m pytest -n auto --maxprocesses 8 --dist worksteal $(MARKERS) $(ARGS)

test-arviz1: .venv-arviz1/.installed
	.venv-arviz1/bin/python -m pytest $(ARVIZ_TESTS) -m "" $(ARGS)

lint: .venv/.installed-test
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

bench: .venv-bench/.installed
	.venv-bench/bin/python -m benchmarks $(ARGS)

# NO_MKDOCS_2_WARNING: Material advertises its successor at every build.
docs: .venv/.installed-test
	.venv/bin/python -m pytest pyro_vi_lab tests/test_readme.py tests/test_docs.py tests/test_tutorials.py $(ARGS)
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict --quiet

dist: .venv/.installed-test
	rm -rf build dist
	.venv/bin/python -m build
	.venv/bin/python -m twine check --strict dist/*

# An empty environment, the wheel, and the README's example, run outside of the checkout.
try-wheel: dist
	rm -rf build/new-user
	.venv/bin/python -m venv build/new-user
	build/new-user/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt dist/*.whl
	cd build/new-user && bin/python ../../tests/try_wheel.py && bin/pyro-vi-lab models

clean:
	rm -rf .venv .venv-arviz1 .venv-bench demo build dist site *.egg-info .coverage htmlcov .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/pyvenv.cfg .venv-bench/pyvenv.cfg:
	@for python in $(PYTHON); do \
	    "$$python" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	    echo "Creating $(@D) with $$("$$python" --version)"; \
	    exec "$$python" -m venv --clear $(@D); \
	done; \
	echo 'No Python >= 3.11 with its venv module found; tried: $(PYTHON).' >&2; \
	echo 'Install one (on Debian and Ubuntu with python3-venv), or name it: make PYTHON=/path/to/python' >&2; \
	exit 1

# ArviZ 1.x needs Python 3.12.
.venv-arviz1/pyvenv.cfg:
	@for python in $(PYTHON) python3.12 python3.13 python3.14; do \
	    "$$python" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null || continue; \
	    echo "Creating $(@D) with $$("$$python" --version)"; \
	    exec "$$python" -m venv --clear $(@D); \
	done; \
	echo 'No Python >= 3.12 with its venv module found; name it: make test-arviz1 PYTHON=/path/to/python3.12' >&2; \
	exit 1

# nutpie's metadata ask for ArviZ 0.2x, though it runs beside 1.x: hence --no-deps.
.venv-arviz1/.installed: pyproject.toml constraints.txt tests/constraints-arviz1.txt | .venv-arviz1/pyvenv.cfg
	@echo 'Installing pyro-vi-lab and ArviZ 1.x into .venv-arviz1 (takes minutes and gigabytes the first time)'
	@$(PIP_INSTALL) -e '.[test]'
	@$(@D)/bin/python -m pip install -qq --disable-pip-version-check --no-deps -r tests/constraints-arviz1.txt
	@touch $@

.venv/.installed: pyproject.toml constraints.txt | .venv/pyvenv.cfg
	@echo 'Installing pyro-vi-lab into .venv (takes minutes the first time)'
	@$(PIP_INSTALL) -e .
	@touch $@

.venv/.installed-test: pyproject.toml constraints.txt | .venv/pyvenv.cfg
	@echo 'Installing pyro-vi-lab and its test tools into .venv (takes minutes the first time)'
	@$(PIP_INSTALL) -e '.[test]'
	@touch .venv/.installed $@

.venv-bench/.installed: pyproject.toml constraints.txt benchmarks/constraints-peers.txt | .venv-bench/pyvenv.cfg
	@echo 'Installing pyro-vi-lab, NumPyro, PyMC, laplace-torch and scikit-learn into .venv-bench (takes minutes the first time)'
	@$(PIP_INSTALL) -c benchmarks/constraints-peers.txt -e . numpyro pymc laplace-torch scikit-learn
	@touch $@

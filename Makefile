# make demo       train the example with torch's AdamW and with fusedopt's; results in demo_out/
# make test       lint, the documents, then the test suite (on a GPU too, where there is one)
# make docs       the site, in build/site; a broken link is an error
# make gpu-test   the GPU tests alone; writes tests/results/gpu.json
# make sanitize   compute-sanitizer over every kind of kernel; writes tests/results/sanitizer.json
# make bench      time the step tail, and what a training loop does around it, beside torch's
# make fuzz       100,000 inputs for the extension's functions, under the address and the undefined-behaviour sanitizer
# make mutants    plant mistakes in the sources and see whether the tests notice; writes tests/results/mutants*.json
# make coverage   line and branch coverage of fusedopt/ and of the C++ engine; reports in build/coverage
# make lint       ruff, clang-format and mypy
# make clean      remove everything that was made, .venv included
#
# Everything is installed into .venv. A torch >= 2.6 that PYTHON can import is used where it is and left as it is;
# otherwise TORCH is installed into .venv. To try another one: make clean; make test TORCH='torch==2.6.0'

PYTHON ?= python3
TORCH ?= torch==2.13.0
WORKERS ?= 2
DEVICE ?= $(if $(shell command -v nvidia-smi),cuda,cpu)

VENV := .venv
BIN := $(VENV)/bin
CXX_SOURCES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cuh')
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Tools are started as modules: beside a torch that was there already they may have been there too, outside $(BIN).
CLANG_FORMAT := $(BIN)/python -c 'import clang_format; clang_format.clang_format()'

.PHONY: demo test lint docs gpu-test sanitize bench sanitized fuzz mutants coverage clean

demo: $(VENV)/demo.stamp
	$(BIN)/python examples/train_gpt.py --out demo_out

test: lint docs
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m "not slow"

lint: $(VENV)/test.stamp
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	@$(CLANG_FORMAT) --dry-run --Werror $(CXX_SOURCES)
	$(BIN)/python -m mypy

docs: $(VENV)/test.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

gpu-test: $(VENV)/test.stamp
	mkdir -p tests/results
	FUSEDOPT_GPU_RESULTS=tests/results/gpu.json $(BIN)/python -m pytest -q -m gpu

sanitize: $(VENV)/test.stamp
	mkdir -p tests/results
	$(BIN)/python tests/tools/sanitize.py --json tests/results/sanitizer.json

bench: $(VENV)/demo.stamp
	mkdir -p benchmarks/results
	$(BIN)/python benchmarks/step.py --device $(DEVICE) --first-step --json benchmarks/results/step-$(DEVICE).json
	$(BIN)/python benchmarks/loop.py --device $(DEVICE) --json benchmarks/results/loop-$(DEVICE).json

# The extension built for gcc's sanitizers, with the Python sources, in build/sanitized/lib.
sanitized: $(VENV)/test.stamp
	$(PIP_INSTALL) 'setuptools>=64' 'pybind11>=2.12' ninja
	FUSEDOPT_SANITIZE=address,undefined \
	  $(BIN)/python setup.py -q build --build-base build/sanitized --build-lib build/sanitized/lib

fuzz: sanitized
	$(BIN)/python -m tests.fuzz --inputs 100000 --seed 0 --jobs $(WORKERS) --sanitized build/sanitized/lib \
	  --json tests/results/fuzz.json

mutants: $(VENV)/test.stamp
	$(BIN)/python tests/mutation --device $(DEVICE) --jobs $(WORKERS)

coverage: $(VENV)/test.stamp
	$(BIN)/python tests/measure_coverage.py --workers $(WORKERS)

clean:
	rm -rf $(VENV) build dist demo_out *.egg-info fusedopt/*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- set-up -----------------------------------------------------------------------------------------------

$(VENV)/demo.stamp: EXTRAS := cuda,bench
$(VENV)/test.stamp: EXTRAS := test,test-integrations,bench,docs

# Editable: Python sources are used where they are. The extension is compiled again when its sources change.
$(VENV)/%.stamp: $(VENV)/torch.stamp pyproject.toml setup.py $(CXX_SOURCES)
	$(PIP_INSTALL) --editable '.[$(EXTRAS)]'
	touch $@

# If PYTHON has a torch that will do, prints the line of a .pth file that makes it visible from .venv. Where PYTHON is
# itself of a virtual environment, --system-site-packages does not. A torch asked for by name is installed all the same.
ifeq ($(origin TORCH),file)
FIND_TORCH = import sys, torch; \
  assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 6); \
  print("import site; site.PREFIXES.append(%r); site.addsitedir(%r)" % (sys.prefix, torch.__path__[0].rpartition("/")[0]))
endif

$(VENV)/torch.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed, PYTHON is " + sys.version)'
	@set -e; \
	found=$$($(PYTHON) -c '$(FIND_TORCH)' 2>/dev/null || true); \
	if [ -n "$$found" ]; then \
	  echo "Using the torch of $(PYTHON)"; \
	  $(PYTHON) -m venv --clear --system-site-packages $(VENV); \
	  echo "$$found" > $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch_of_python.pth; \
	else \
	  echo "Installing $(TORCH)"; \
	  $(PYTHON) -m venv --clear $(VENV); \
	  $(PIP_INSTALL) '$(TORCH)'; \
	fi
	touch $@

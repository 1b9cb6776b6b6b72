# `make test` and `make bench` work from nothing but python3: they create .venv, install torch and the package in it,
# and build the extension wherever a C++ compiler is (with the CUDA kernels where nvcc is).

VENV   ?= .venv
PYTHON ?= python3
TORCH  ?= torch>=2.11
OUT    ?= benchmarks/results/latest

PY      := $(VENV)/bin/python
STAMP   := build/installed
CXX_SRC := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.h csrc/*/*.cuh)
CXX_ALL := $(CXX_SRC) $(wildcard tests/simt/*.h tests/simt/*.cpp)

# Without a compiler there is still Python to test and to time.
export IAL_CUDA_PURE_PYTHON ?= $(if $(shell command -v $${CXX:-c++} 2>/dev/null),0,1)

# Without a GPU, fewer architectures than setup.py would take for a user: nvcc needs a minute or two for each.
export TORCH_CUDA_ARCH_LIST ?= $(if $(shell nvidia-smi -L 2>/dev/null),,8.0;9.0+PTX)

# The extension lies in the checkout and fits one torch: a stamp that another environment left, or this one before
# its torch changed, does not count.
TORCH_HERE := $(PY) -c 'import sys; from importlib.metadata import version; print(sys.prefix, version("torch"))'
ifneq ($(shell $(TORCH_HERE) 2>/dev/null),$(shell cat $(STAMP) 2>/dev/null))
.PHONY: $(STAMP)
endif

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help test bench gpu-check gpu-bench lint format sdist clean

help: ## print this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "VENV=$(VENV)  an environment to use; a torch in it is left as it is. Else one is created there."
	@echo "TORCH='$(TORCH)'  what to install where there is no torch.  PYTHON=$(PYTHON)  creates the environment,"
	@echo "and runs gpu-check and gpu-bench as it is.  OUT=$(OUT)  is where they leave their results."
	@echo "IAL_CAMVID  the CamVid data set's folder, for the tests and benchmarks that use it."

# Two at a time: emulated kernels run on one thread. Those of the others must not spin while they wait.
test: lint ## check style, then run the tests
	OMP_WAIT_POLICY=passive $(PY) -m pytest -n 2

bench: $(STAMP) ## time the loss on this machine: everyone who computes it, sizes, classes, types; ten minutes
	$(PY) -m benchmarks

# Installs nothing, so that it works where nothing can be: $(PYTHON) is taken as it is.
gpu-check: ## build for this GPU, run the tests and compute-sanitizer, in nine minutes; without a GPU, a dry run
	$(PYTHON) -m benchmarks.gpu_check check --output $(OUT)

gpu-bench: ## run the benchmarks on this GPU, in nine minutes; without a GPU, a dry run
	$(PYTHON) -m benchmarks.gpu_check bench --output $(OUT)

lint: $(STAMP) ## check style and formatting
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_ALL)

format: $(STAMP) ## format the sources
	$(PY) -m ruff check --fix
	$(PY) -m ruff format
	$(VENV)/bin/clang-format -i $(CXX_ALL)

sdist: $(STAMP) ## write the source distribution to dist/
	$(PY) -m build --sdist --no-isolation

clean: ## remove what was built; the environment stays
	rm -rf build dist ial_cuda.egg-info ial_cuda/_C*.so ial_cuda/_build.json .pytest_cache .ruff_cache .hypothesis
	find ial_cuda tests benchmarks -name __pycache__ -prune -exec rm -r {} +

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "ial_cuda needs Python 3.10 or newer; $(PYTHON) is " + sys.version.split()[0] + ": name another with PYTHON=")'
	@echo "==> creating the environment $(VENV)"
	@$(PYTHON) -m venv $(VENV)

# The constraint keeps pip from ever replacing a torch that it finds.
$(STAMP): $(CXX_SRC) setup.py pyproject.toml benchmarks/peers.txt | $(PY)
	@mkdir -p build
	@$(PY) -c 'from importlib import metadata as m; print(*("torch==" + d.version for d in m.distributions(name="torch")))' > build/constraints.txt
	@echo "==> $(VENV) has $$(grep torch build/constraints.txt || echo 'no torch yet'), wanted is $(TORCH)"
	@$(PY) -m pip install -q --disable-pip-version-check -c build/constraints.txt '$(TORCH)' 'setuptools>=77' ninja
	@echo "==> building ial_cuda into $(VENV) (minutes, where nvcc compiles)"
	@$(PY) -m pip install -q --disable-pip-version-check -c build/constraints.txt --no-build-isolation -e '.[dev]'
	@echo "==> installing what ial_cuda is compared with"
	@$(PY) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > build/constraints.txt
	@grep -v '^#' benchmarks/peers.txt | while read -r peer; do \
		$(PY) -m pip install -q --disable-pip-version-check -c build/constraints.txt "$$peer" \
			|| echo "==> without $$peer: the benchmarks skip it"; \
	done
	@$(PY) -m ial_cuda info
	@$(TORCH_HERE) > $@

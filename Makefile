# `make test` and `make bench` need only python3. They create .venv and install torch and the package in it.
# The extension is built if there is a C++ compiler, and its CUDA kernels if there is an nvcc.

VENV   ?= .venv
PYTHON ?= python3
TORCH  ?= torch>=2.11
OUT    ?= benchmarks/results/latest

PY      := $(VENV)/bin/python
STAMP   := build/installed
CXX_SRC := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.h csrc/*/*.cuh)
CXX_ALL := $(CXX_SRC) $(wildcard tests/simt/*.h tests/simt/*.cpp)

# Without a compiler, the Python code is still tested and timed.
export IAL_CUDA_PURE_PYTHON ?= $(if $(shell command -v $${CXX:-c++} 2>/dev/null),0,1)

# Without a GPU, we build for fewer architectures than setup.py's default: nvcc needs a minute or two for
# each.
export TORCH_CUDA_ARCH_LIST ?= $(if $(shell nvidia-smi -L 2>/dev/null),,8.0;9.0+PTX)

# The extension is in the checkout and fits one torch. A stamp is ignored if it comes from another
# environment, or from before the environment's torch changed.
TORCH_HERE := $(PY) -c 'import sys; from importlib.metadata import version; print(sys.prefix, version("torch"))'
ifneq ($(shell $(TORCH_HERE) 2>/dev/null),$(shell cat $(STAMP) 2>/dev/null))
.PHONY: $(STAMP)
endif

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help test bench bench-full gpu-check gpu-bench lint docs format sdist clean

help: ## print this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "VENV=$(VENV)  the environment, created if missing. A torch that it has is kept."
	@echo "TORCH='$(TORCH)'  is installed if there is no torch.  PYTHON=$(PYTHON)  creates the environment"
	@echo "and runs gpu-check and gpu-bench.  OUT=$(OUT)  is the folder for their results."
	@echo "IAL_CAMVID  is the folder of the CamVid data set, for the tests and benchmarks that use it."

# Two workers: emulated kernels run on one thread. The threads of other tests must not spin while they wait.
test: lint docs ## check style, build the documentation, then run the tests
	OMP_WAIT_POLICY=passive $(PY) -m pytest -n 2

bench: $(STAMP) ## time loss and gradient on this machine beside PyTorch and other libraries; three minutes
	$(PY) -m benchmarks

bench-full: $(STAMP) ## the same for more sizes, classes and dtypes, and a training step; half an hour
	$(PY) -m benchmarks --full

# Installs nothing, because some GPU machines do not allow it. $(PYTHON) is used as it is.
gpu-check: ## build for this GPU, run the tests and compute-sanitizer, in nine minutes; without a GPU, a dry run
	$(PYTHON) -m tools.gpu_check check --output $(OUT)

gpu-bench: ## run the benchmarks on this GPU, in nine minutes; without a GPU, a dry run
	$(PYTHON) -m tools.gpu_check bench --output $(OUT)

lint: $(STAMP) ## check style and formatting
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_ALL)

# mkdocs-material prints a notice on its own future without this variable.
docs: $(STAMP) ## build the documentation in build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

format: $(STAMP) ## format the sources
	$(PY) -m ruff check --fix
	$(PY) -m ruff format
	$(VENV)/bin/clang-format -i $(CXX_ALL)

sdist: $(STAMP) ## write the source distribution to dist/
	$(PY) -m build --sdist --no-isolation

clean: ## remove build outputs; the environment stays
	rm -rf build dist ial_cuda.egg-info ial_cuda/_C*.so ial_cuda/_build.json .pytest_cache .ruff_cache .hypothesis
	find ial_cuda tests benchmarks examples tools -name __pycache__ -prune -exec rm -r {} +

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "ial_cuda needs Python 3.10 or newer; $(PYTHON) is " + sys.version.split()[0] + ": name another with PYTHON=")'
	@echo "==> creating the environment $(VENV)"
	@$(PYTHON) -m venv $(VENV)

# The constraint prevents pip from replacing a torch that it finds.
$(STAMP): $(CXX_SRC) setup.py pyproject.toml benchmarks/peers.txt | $(PY)
	@mkdir -p build
	@$(PY) -c 'from importlib import metadata as m; print(*("torch==" + d.version for d in m.distributions(name="torch")))' > build/constraints.txt
	@echo "==> $(VENV) has $$(grep torch build/constraints.txt || echo 'no torch yet'); required: $(TORCH)"
	@$(PY) -m pip install -q --disable-pip-version-check -c build/constraints.txt '$(TORCH)' 'setuptools>=77' ninja
	@echo "==> building ial_cuda in $(VENV) (takes minutes with nvcc)"
	@$(PY) -m pip install -q --disable-pip-version-check -c build/constraints.txt --no-build-isolation -e '.[dev]'
	@echo "==> installing the libraries that the benchmarks compare with"
	@$(PY) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > build/constraints.txt
	@grep -v '^#' benchmarks/peers.txt | while read -r peer; do \
		$(PY) -m pip install -q --disable-pip-version-check -c build/constraints.txt "$$peer" \
			|| echo "==> cannot install $$peer; the benchmarks skip it"; \
	done
	@$(PY) -m ial_cuda info
	@$(TORCH_HERE) > $@

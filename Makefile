# What CI runs, a person runs: every target sets up what it needs in .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=
# Processes that `make test` runs tests in, each some whole files; 0: in this one, as a debugger wants it.
TEST_JOBS ?= 2
# How long `make mutants` begins breakages, which ones, and of what (all rooms).
MUTANT_SECONDS ?= 600
MUTANT_SEED ?= 1
MUTANT_PATHS ?=
# Where `make peers-qemu` keeps its Debian root; tests/peers/qemu and tests/peers/libvirt look there.
export QEMU_ROOT ?= /var/cache/vring/qemu-root
# Where `make peers-vdagent` keeps a newer SPICE agent.
export VDAGENT_ROOT ?= /var/cache/vring/vdagent-root
export PIP_DISABLE_PIP_VERSION_CHECK := 1

SOURCES := $(wildcard vring/*.pyx vring/*.pxd)

.PHONY: help build run test check check-coverage coverage chaos soak bench fuzz sanitize tsan mutants format picture-top man wheel wheel-check peers \
	peers-qemu peers-vdagent clean
.DEFAULT_GOAL := help

help: ## what can be made
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

$(VENV)/tools: pyproject.toml
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "vring needs Python 3.11 or later with venv (Debian: apt-get install python3-venv python3-dev gcc)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --group build --group test
	@touch $@

$(VENV)/check-tools: $(VENV)/tools
	$(BIN)/python -m pip install --quiet --group check
	@touch $@

$(VENV)/built: $(VENV)/tools setup.py $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable .
	@touch $@

build: $(VENV)/built ## compile and install into .venv, editable

run: build ## the main job: the whole agent path on the embedded guest
	$(BIN)/vring demo

# Set: the tests are measured, which takes more processor time.
MEASURE ?= $(COVERAGE)
test: build ## the tests; those that need a real peer skip without it (make peers)
ifeq ($(MEASURE),)
	$(BIN)/python -m pytest --numprocesses $(TEST_JOBS) --dist loadfile $(PYTEST_ARGS)
else
	$(BIN)/python -m pip install --quiet --group coverage
	rm -rf build/coverage && mkdir -p build/coverage
	VRING_SANDBOX=off $(BIN)/coverage run -m pytest $(PYTEST_ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --fail-under=0 > build/coverage/report.txt
	$(BIN)/coverage report --fail-under=0 --format=total > build/coverage/total
endif

check: build $(VENV)/check-tools check-coverage ## linters, docstrings, types, import contracts, coverage as last measured
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python scripts/check-docstrings
	$(BIN)/python scripts/check-lengths
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/cython-lint vring
	$(BIN)/mypy
	$(BIN)/mypy --config-file tests/mypy.ini
	$(BIN)/lint-imports
	$(BIN)/python -m mypy.stubtest vring --concise

check-coverage:
	@$(PYTHON) scripts/check-coverage

format: $(VENV)/check-tools ## let ruff format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

coverage: ## the tests with the coverage of lines and branches, processes that they start included
	$(MAKE) test MEASURE=1
	@cat build/coverage/report.txt
	@$(PYTHON) scripts/check-coverage

CHAOS_KILLS ?= 1000
chaos: build ## workers killed CHAOS_KILLS times under full traffic, for each way in and layout
	VRING_CHAOS_KILLS=$(CHAOS_KILLS) $(BIN)/python -m pytest tests/service/test_chaos.py --timeout=0 -o faulthandler_timeout=0 $(PYTEST_ARGS)

SOAK_SECONDS ?= 3600
soak: build ## two VMs with 64 ports under everything that happens to one, for SOAK_SECONDS; figures at the end
	SOAK_SECONDS=$(SOAK_SECONDS) $(BIN)/python -m pytest tests/service/test_soak.py -o faulthandler_timeout=0 $(PYTEST_ARGS)

bench: build ## the benchmarks
	$(BIN)/python -m pytest benchmarks --benchmark-only --override-ini addopts= $(PYTEST_ARGS)

FUZZ_SECONDS ?= 60
HAMMER_MESSAGES ?= 3000000
fuzz: build ## each fuzzer for FUZZ_SECONDS, and two processes on one ring for HAMMER_MESSAGES
	@$(BIN)/python -m pip install --quiet --only-binary :all: --group fuzz || \
		echo "atheris has no wheel for $$($(BIN)/python --version): inputs are random, not guided by coverage"
	for target in ring registers vfio_user protocols; do \
		$(BIN)/python fuzz/$$target.py --seconds $(FUZZ_SECONDS) || exit 1; \
	done
	for layout in split packed; do for events in "" --event-idx; do \
		$(BIN)/python fuzz/hammer.py --layout $$layout $$events --messages $(HAMMER_MESSAGES) || exit 1; \
	done; done

SANITIZED := build/sanitize
SANITIZERS = LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0:handle_sigbus=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	PYTHONMALLOC=malloc PYTHONPATH=$(SANITIZED)
sanitize: build ## the ring's tests and fuzzing under AddressSanitizer and UBSan (in build/sanitize)
	VRING_SANITIZE=address,undefined $(BIN)/python setup.py -q build --build-lib $(SANITIZED) \
		--build-temp $(SANITIZED)-objects
	$(SANITIZERS) $(BIN)/python fuzz/ring.py --random --seconds $(FUZZ_SECONDS)
	for layout in split packed; do \
		$(SANITIZERS) $(BIN)/python fuzz/hostile.py --layout $$layout --seconds $(FUZZ_SECONDS) || exit 1; \
	done
	$(SANITIZERS) $(BIN)/pytest -q -p no:cacheprovider --capture=sys tests/vring --ignore tests/vring/test_cimport.py \
		--ignore tests/vring/test_native.py --ignore tests/vring/test_allocation.py -k "not machine_code"

# Its runtime wants the addresses where it expects them, hence setarch. Its compiler knows no fences: it
# warns of each (setup.py turns that off) and goes by the atomics beside them.
THREADS := build/tsan
THREAD_SANITIZER = LD_PRELOAD="$$(gcc -print-file-name=libtsan.so)" PYTHONPATH=$(THREADS) \
	TSAN_OPTIONS=halt_on_error=1:handle_sigbus=0:suppressions=$(abspath fuzz/tsan.supp) setarch -R
mutants: build ## breakages that no test notices, begun for MUTANT_SECONDS, chosen by MUTANT_SEED
	$(BIN)/python scripts/mutants.py --seconds $(MUTANT_SECONDS) --seed $(MUTANT_SEED) $(MUTANT_PATHS)

tsan: build ## the pump's tests and a hostile driver under ThreadSanitizer (in build/tsan)
	VRING_SANITIZE=thread $(BIN)/python setup.py -q build --build-lib $(THREADS) \
		--build-temp $(THREADS)-objects
	$(THREAD_SANITIZER) $(BIN)/pytest -q -p no:cacheprovider --capture=sys tests/vring/test_pump*.py
	for layout in split packed; do \
		$(THREAD_SANITIZER) $(BIN)/python fuzz/hostile.py --layout $$layout --seconds $(FUZZ_SECONDS) || exit 1; \
	done

picture-top: build ## docs/ctl-top.svg: what `vring ctl top` prints of a service at work
	$(BIN)/python scripts/picture-top docs/ctl-top.svg

man: build ## man/: the page of every command, from its help
	$(BIN)/python scripts/make-man man

wheel: $(VENV)/tools ## a wheel in dist/
	$(BIN)/python -m build --wheel

# Interpreters that `make wheel-check` builds for and tests on.
PYTHONS ?= $(PYTHON)
wheel-check: ## an sdist, from it a wheel for each of PYTHONS, past auditwheel and tested with no compiler
	scripts/check-wheel $(PYTHONS)

peers: ## Debian packages of the real peers: User-Mode Linux, the SPICE agent, an X server
	$(if $(filter 0,$(shell id -u)),,sudo) apt-get update
	$(if $(filter 0,$(shell id -u)),,sudo) env DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
		user-mode-linux busybox-static qemu-guest-agent spice-vdagent xvfb xclip x11-xserver-utils socat curl zsh fish \
		libspice-server1 libseccomp2 gir1.2-spiceclientglib-2.0 python3-gi openssl gcc-riscv64-linux-gnu

peers-qemu: ## a Debian testing root with QEMU, libvirt and a kernel, cached (needs root, 2 to 4 minutes)
	$(if $(filter 0,$(shell id -u)),,sudo) env DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends debootstrap
	$(if $(filter 0,$(shell id -u)),,sudo) tests/peers/qemu/make-root $(QEMU_ROOT)

peers-vdagent: ## the SPICE agent of Debian testing, unpacked beside this machine's (half a minute)
	$(if $(filter 0,$(shell id -u)),,sudo) tests/peers/make-vdagent-root $(VDAGENT_ROOT)

clean: ## remove what was built
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache *.egg-info vring/*.so $(VENV)/built

# The project's commands. Everything is installed into .venv from the committed lock files.

PYTHON ?= python3
BIN := .venv/bin
# Installs in seconds what pip takes a minute and a half for.
UV_VERSION := 0.13.9
# What to install JAX for: cpu, cuda12, cuda13 or tpu; unless given, what the NVIDIA driver runs.
DRIVER := $(shell nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null \
	| grep -E -m 1 '^[0-9]+\.')
DRIVER_MAJOR := $(or $(firstword $(subst ., ,$(DRIVER))),0)
ACCELERATOR ?= $(shell if [ $(DRIVER_MAJOR) -ge 580 ]; then echo cuda13; \
	elif [ $(DRIVER_MAJOR) -ge 525 ]; then echo cuda12; else echo cpu; fi)
RUN := .venv/.run-$(ACCELERATOR)
SAMPLE := data/sample_geotiffs
DATASET := data/sample/ssl4eo_s12_nol/.built
WORKDIR ?= runs/sample
TILES := data/sample_tiles
TILE_DATASET := data/sample/dfc2020/.built
FINETUNE := configs/finetune.py:task=dfc2020,input=s2,encoder=frozen,sample

.PHONY: pretrain finetune test test-slow test-all bench lint wheel lock clean

# Sample data, records, pretraining, report: minutes on two cores.
pretrain: $(DATASET)
	$(BIN)/python -m cromss_jax.main --config=configs/pretrain.py:sample --workdir=$(WORKDIR)
	@echo "Table: $(WORKDIR)/results.md   Picture: $(WORKDIR)/samples.png"

$(WORKDIR)/results.md:
	$(MAKE) pretrain

# Clean tiles of other places, an encoder drawn anew and the pretrained one, both frozen; a table.
finetune: $(WORKDIR)/results.md $(TILE_DATASET)
	$(BIN)/python -m cromss_jax.main --config=$(FINETUNE) --workdir=$(WORKDIR)_dfc2020/random
	$(BIN)/python -m cromss_jax.main --config=$(FINETUNE) --workdir=$(WORKDIR)_dfc2020/pretrained \
		--config.init_from=$(WORKDIR)
	$(BIN)/python -m cromss_jax.compare $(WORKDIR)_dfc2020/random $(WORKDIR)_dfc2020/pretrained

PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: .venv/.test
	$(PYTEST) -m "not slow"

# What is slow by nature, and all that compares numbers once more, compiled as users compile.
test-slow: .venv/.test
	COMPILE_AS_USERS=1 $(PYTEST) -m "slow or numeric"

test-all: test test-slow

# Measures anew and rewrites the tables of tests/bench/README.md; ONLY=step,input measures some parts.
bench: .venv/.test
	$(BIN)/python -m tests.bench $(if $(ONLY),--only=$(ONLY))

lint: .venv/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

# A wheel in dist/, made from the source archive beside it, so that nothing stale gets into it.
wheel: $(RUN)
	$(BIN)/uv build -q

$(RUN): requirements.lock pyproject.toml
	@echo "Installing for $(ACCELERATOR) (NVIDIA driver: $(or $(DRIVER),none found);" \
		"cuda12 needs 525, cuda13 580; ACCELERATOR=cpu|cuda12|cuda13|tpu overrides)"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q uv==$(UV_VERSION)
	$(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python -r requirements.lock \
		$(if $(filter-out cpu,$(ACCELERATOR)),'jax[$(ACCELERATOR)]')
	$(BIN)/uv pip install -q --python $(BIN)/python --no-deps -e .
	touch $@

# PyTorch from the disk where pip is told to look there.
.venv/.test: requirements-test.lock $(RUN)
	$(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python $(addprefix --find-links ,$(PIP_FIND_LINKS)) \
		-r requirements-test.lock
	touch $@

$(SAMPLE)/dw_complete_ids.csv: | $(RUN)
	rm -rf $(SAMPLE)
	$(BIN)/python -m data_prep.sample --output_dir=$(SAMPLE) \
		--locations=64 --seasons=4 --tile_size=132 --seed=0

$(DATASET): $(SAMPLE)/dw_complete_ids.csv
	rm -rf data/sample
	$(BIN)/python -m data_prep.build --dataset=ssl4eo_s12_nol \
		--source_dir=$(SAMPLE) --data_dir=data/sample
	touch $@

$(TILES)/dfc_test: | $(RUN)
	rm -rf $(TILES)
	$(BIN)/python -m data_prep.sample --format=dfc2020 --output_dir=$(TILES) \
		--locations=64 --tile_size=96 --seed=1

$(TILE_DATASET): $(TILES)/dfc_test $(DATASET)
	rm -rf data/sample/dfc2020
	$(BIN)/python -m data_prep.build --dataset=dfc2020 --source_dir=$(TILES) --data_dir=data/sample
	touch $@

# Writes the lock files anew from pyproject.toml, the second with the first's versions.
lock:
	$(BIN)/uv pip compile -q --no-annotate --universal --python-version 3.11 --extra gcs \
		pyproject.toml -o requirements.lock
	$(BIN)/uv pip compile -q --no-annotate --universal --python-version 3.11 --extra gcs \
		--extra test --extra torch -c requirements.lock pyproject.toml -o requirements-test.lock

clean:
	rm -rf .venv data runs build dist

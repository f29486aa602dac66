# Each target sets up what it needs in .venv; nothing has to be installed by hand but python3 (with venv) and make.
#
#   make quickstart   text that ships with Python -> a small GPT-2 that writes, in minutes, on a CPU or a GPU
#   make install      .venv with the project (editable) and its command `gpt2repro`
#   make test         the tests, about 10 minutes on two cores
#   make test-all     also kill campaigns, browser and notebooks, under 40
#   make test-oldest  the model pair on the oldest transformers that setup.cfg admits
#   make test-gpu-image  the model pair, FSDP2 and a short run on the versions of a bare GPU image (5 GB: by hand)
#   make conformance  CHECKPOINT=runs/quickstart in the programs that people use (3 GB; llama.cpp is built: minutes; by hand)
#   make style        ruff: lint and format

BASE_PYTHON ?= python3
VENV := .venv
PYTHON := $(VENV)/bin/python
# `make CONSTRAINTS=constraints.txt …` takes exactly the versions that were tested; CI does.
PIP_INSTALL := $(PYTHON) -m pip install --quiet $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))
CORES := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
# A test process holds about 1 GB, so not one per core on a big machine.
PYTEST := $(PYTHON) -m pytest -n logical --maxprocesses 8 --timeout 600

.PHONY: help install quickstart test test-all test-oldest test-gpu-image conformance style
help:
	@sed -n 's/^#   //p' Makefile

install: $(VENV)/installed

# A stamp is older than setup.cfg when the requirements have changed, or absent when an installation broke off.
$(VENV)/installed: setup.cfg pyproject.toml | $(PYTHON)
	$(PIP_INSTALL) --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(PIP_INSTALL) --editable '.[test]'
	touch $@

$(VENV)/installed-test-all: $(VENV)/installed-test
	$(PIP_INSTALL) --editable '.[test-all]'
	touch $@

$(PYTHON):
	$(BASE_PYTHON) -m venv $(VENV) || { echo "python3 has no venv here; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }

# Accelerate starts a process with one thread unless told otherwise; a CPU run wants all cores.
quickstart: export OMP_NUM_THREADS ?= $(CORES)
quickstart: $(VENV)/installed
	$(PYTHON) -m gpt2repro prepare-text --corpus python-docs --out data/python-docs
	machine=$$($(PYTHON) -c "import torch; print('single_gpu' if torch.accelerator.is_available() else 'cpu')") && \
	  $(VENV)/bin/accelerate launch --config_file accelerate_configs/$$machine.yaml \
	  train_accelerate.py --config gpt2repro/presets/quickstart.yaml

test: $(VENV)/installed-test
	$(PYTEST) -m "not slow and not browser and not notebook"

test-all: test $(VENV)/installed-test-all
	$(PYTEST) -m "slow or browser or notebook or extra" --timeout 1800

# An environment of its own: the project's other requirements would pull a newer transformers in.
$(VENV)-oldest/installed: setup.cfg
	$(BASE_PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet 'torch>=2.11,<2.14' transformers==5.4.0 accelerate pytest pytest-timeout
	touch $@

test-oldest: $(VENV)-oldest/installed
	$(VENV)-oldest/bin/python -m pytest -q tests/test_modeling.py

# torch 2.11 is to be had as a CUDA build only.
$(VENV)-gpu-image/installed: setup.cfg
	$(BASE_PYTHON) -m venv $(VENV)-gpu-image
	$(VENV)-gpu-image/bin/python -m pip install --quiet torch==2.11.0 transformers==5.17.0 accelerate==1.15.0 \
	  huggingface_hub==1.33.0 pydantic filelock matplotlib psutil pyarrow tensorboard tiktoken tqdm pytest pytest-timeout
	touch $@

test-gpu-image: $(VENV)-gpu-image/installed
	$(VENV)-gpu-image/bin/python -m pytest -q tests/test_modeling.py tests/test_fsdp2.py tests/test_train.py

# One environment per group of programs whose requirements agree; the rows are collected in one file.
CHECKPOINT ?= runs/quickstart
CONFORMANCE_OUT ?= $(CHECKPOINT)/conformance.json
LLAMA_CPP := $(VENV)-llama-cpp/llama_cpp_python
# lighteval's S3 client wants one fsspec and few versions of botocore; left alone, pip tries versions for half an hour.
LIGHTEVAL_NEEDS := inspect-ai==0.3.285 s3fs==2026.6.0 aiobotocore==3.10.0 boto3==1.43.117 botocore==1.43.117
$(VENV)-%/installed-conformance: setup.cfg constraints.txt
	$(BASE_PYTHON) -m venv $(VENV)-$*
	grep -v '^fsspec' constraints.txt > $(VENV)-$*/constraints.txt
	$(VENV)-$*/bin/python -m pip install --quiet --constraint $(VENV)-$*/constraints.txt \
	  --editable '.[$(if $(filter llama-cpp,$*),gguf,$*)]' $(if $(filter lighteval,$*),$(LIGHTEVAL_NEEDS))
	touch $@

# The converter comes with llama.cpp's sources only.
$(LLAMA_CPP): $(VENV)-llama-cpp/installed-conformance
	$(VENV)-llama-cpp/bin/python -m pip download --quiet --constraint $(VENV)-llama-cpp/constraints.txt \
	  --no-deps --no-binary llama-cpp-python --dest $(@D)/sdist llama-cpp-python
	mkdir -p $@ && tar -xzf $(@D)/sdist/llama_cpp_python-*.tar.gz -C $@ --strip-components 1

conformance: export PYTHONPATH := $(CURDIR)
conformance: $(VENV)-conformance-all/installed-conformance $(VENV)-lighteval/installed-conformance $(LLAMA_CPP)
	$(VENV)-lighteval/bin/python -m gpt2repro conformance $(CHECKPOINT) --out $(CONFORMANCE_OUT) --only lighteval
	$(VENV)-llama-cpp/bin/python -m gpt2repro conformance $(CHECKPOINT) --out $(CONFORMANCE_OUT) --only llama.cpp \
	  --converter $(LLAMA_CPP)/vendor/llama.cpp/convert_hf_to_gguf.py
	$(VENV)-conformance-all/bin/python -m gpt2repro conformance $(CHECKPOINT) --out $(CONFORMANCE_OUT)

style: $(VENV)/installed-test
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

# On a machine with Python (3.11 or later), pip and make, each of these works by itself:
#   make demo     serve the model that ships, embed a sample, show what came out; PAGE=1 then serves a page for browsers
#   make test     everything CI runs; `make check` and `make tests` are its halves
# WORKERS says how many processes run the tests. PYTHON names the interpreter; pip's own variables (PIP_INDEX_URL,
# PIP_FIND_LINKS, …) say where packages come from.

PYTHON ?= python3
WORKERS ?= $(shell expr $$(nproc 2> /dev/null || echo 2) + 1)
VENV := .venv
BIN := $(VENV)/bin
PROTO_VENV := .venv-proto
# Triton's Python package can't share an environment with our libraries: it needs older numpy and protobuf
TRITON_VENV := .venv-triton
# The compiler Triton, before ours on PYTHONPATH
OLD_TRITON := .venv-triton-3.6
# Nor can the clients of the Open Inference Protocol: they need older protobuf, and bring its messages in their own pool
KSERVE_VENV := .venv-kserve
# Clients of OpenAI's API are no dependency of ours; the one for JavaScript is there where npm is
OPENAI_VENV := .venv-openai
# AllenNLP's `Elmo` cut out of it, what ours is held against: its package says nothing of what it needs
ELMO_VENV := .venv-elmo
# The oldest tools whose output we support: their versions set the floors of grpcio and protobuf in pyproject.toml.
PROTO_TOOLS := grpcio-tools==1.74.0 protobuf==6.33.6 googleapis-common-protos==1.76.0 mypy-protobuf==5.1.0
# What released clients were built with
PROTO_BASELINE := proto/baseline/0.1.binpb
AUDIT_VENV := .venv-audit
DATA ?= ../shared/data
RUN ?= runs/wikitext2-mini
# Tests have limits of their own (tests/support/time_limits.py); this one is for what comes before and after them.
LIMITED := timeout --foreground --kill-after=30

.PHONY: demo serve test tests test-gpu test-triton test-slow chaos fuzz audit diagrams check proto proto-baseline bench bench-original bench-before bench-memory bench-full bench-training bench-page train clean

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py $(if $(PAGE),--page)

serve: $(VENV)/.demo
	$(BIN)/bilm-serve $(ARGS)

# side by side, because half of `check` keeps one core busy only
test: $(VENV)/.dev $(PROTO_VENV)/.installed
	+$(MAKE) --no-print-directory --jobs 2 check tests

# OpenMP's threads sleep instead of spinning while they wait for one another: spinning takes the cores from other workers.
# A worker more than cores: one of them usually waits for a server, a time-out or a network. A worker that has done its
# share takes over half of the longest one that is left.
tests: $(VENV)/.dev
	OMP_WAIT_POLICY=passive $(LIMITED) 60m $(BIN)/pytest -m "not slow" --numprocesses $(WORKERS) --dist worksteal

# on a machine with a GPU; without `make`: python -m pytest -m gpu tests/parity
test-gpu: $(VENV)/.dev
	$(LIMITED) 30m $(BIN)/pytest -m gpu tests/parity

# the Triton kernels, interpreted and compiled, with the version that comes with the oldest torch that we support
test-triton: $(VENV)/.dev $(OLD_TRITON)/.installed
	PYTHONPATH=$(OLD_TRITON) $(LIMITED) 60m $(BIN)/pytest tests/unit/model/test_triton_steps.py \
	  tests/unit/model/test_compile_kernels.py tests/parity/test_cuda.py $(ARGS)

test-slow: $(VENV)/.dev $(KSERVE_VENV)/.installed $(OPENAI_VENV)/.installed $(ELMO_VENV)/.installed
	$(LIMITED) 4h $(BIN)/pytest -m slow

# faults of all kinds under load, each answer compared with the known one; five minutes
chaos: $(VENV)/.dev
	$(BIN)/python -m tests.fault.chaos --minutes 5 $(ARGS)

# malformed frames and fields against a real server; ten minutes
fuzz: $(VENV)/.dev
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[fuzz]'
	$(BIN)/python -m tests.security.fuzz_run --minutes 10 $(ARGS)

# known vulnerabilities of what is installed; fails where the index has no such list
audit: $(VENV)/.dev $(AUDIT_VENV)/.installed
	$(BIN)/pip freeze --exclude-editable | sed 's/+[^ ]*$$//' > $(AUDIT_VENV)/installed.txt
	$(AUDIT_VENV)/bin/pip-audit -s pypi --strict --no-deps --disable-pip -r $(AUDIT_VENV)/installed.txt

# docs/diagrams/*.puml -> *.svg; needs plantuml and graphviz
diagrams: $(VENV)/.dev
	$(BIN)/python docs/diagrams/render.py

check: $(VENV)/.dev $(PROTO_VENV)/.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PROTO_VENV)/bin/python proto/generate.py --check --image $(PROTO_VENV)/embed.binpb
	$(BIN)/buf lint $(PROTO_VENV)/embed.binpb --config proto/buf.yaml
	$(BIN)/buf breaking $(PROTO_VENV)/embed.binpb --config proto/buf.yaml --against $(PROTO_BASELINE)

proto: $(PROTO_VENV)/.installed
	$(PROTO_VENV)/bin/python proto/generate.py

# the contract of a release, for `buf breaking`; proto/buf.yaml says when
proto-baseline: $(PROTO_VENV)/.installed
	$(PROTO_VENV)/bin/python proto/generate.py --check --baseline proto/baseline/$(RELEASE).binpb

# under ten minutes on two cores, with nothing else running
bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks.bench $(ARGS)

# the original size, and the protocols: about seven minutes
bench-original: $(VENV)/.dev
	$(BIN)/python -m benchmarks.bench --original $(ARGS)

# against the commit before, in a work tree and processes of its own: about two hours; ARGS='--rounds 3 --window-s 2'
bench-before: $(VENV)/.dev
	$(BIN)/python -m benchmarks.experiments.before $(ARGS)

# a server's memory under mixed requests: ten minutes; ARGS='--minutes 60' an hour
bench-memory: $(VENV)/.dev
	$(BIN)/python -m benchmarks.experiments.memory $(ARGS)

# load sweeps, and what else one could run: about an hour
bench-full: $(VENV)/.dev $(TRITON_VENV)/.installed
	$(BIN)/python -m benchmarks.experiments.full --triton-python $(TRITON_VENV)/bin/python

# training, against the published order of work: about three minutes
bench-training: $(VENV)/.dev
	$(BIN)/python -m benchmarks.experiments.training

bench-page: $(VENV)/.dev
	$(BIN)/python -m bilm_bench.reporting.experiment_page benchmarks/results

# the model that ships, and what it knows; the model card says how long that takes
train: $(VENV)/.dev
	$(BIN)/bilm-train run model/bilm_model/pretrained/wikitext2-mini.toml \
	  --train $(DATA)/wikitext-2/train.txt --valid $(DATA)/wikitext-2/valid.txt --out $(RUN)
	$(BIN)/bilm-train eval $(RUN) --text $(DATA)/wikitext-2/test.txt --text $(DATA)/wikitext-2/valid.txt \
	  --treebank $(DATA)/UD_English-EWT --treebank $(DATA)/UD_Korean-GSD --neighbours $(DATA)/wikitext-2/test.txt

clean:
	rm -rf $(VENV) $(PROTO_VENV) $(TRITON_VENV) $(OLD_TRITON) $(KSERVE_VENV) $(OPENAI_VENV) $(ELMO_VENV) $(AUDIT_VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "needs Python 3.11 or later; PYTHON=… names one")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[server,files,http]'
	touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@ $(VENV)/.demo

$(PROTO_VENV)/.installed: Makefile
	$(PYTHON) -m venv $(PROTO_VENV)
	$(PROTO_VENV)/bin/pip install --quiet $(PROTO_TOOLS)
	touch $@

$(AUDIT_VENV)/.installed: Makefile
	$(PYTHON) -m venv $(AUDIT_VENV)
	$(AUDIT_VENV)/bin/pip install --quiet pip-audit==2.10.1
	touch $@

$(TRITON_VENV)/.installed: Makefile
	$(PYTHON) -m venv $(TRITON_VENV)
	$(TRITON_VENV)/bin/pip install --quiet nvidia-pytriton==0.7.0 tritonclient==2.73.0 torch==2.13.0 numba==0.68.1 \
	  grpcio==1.85.1
	touch $@

$(KSERVE_VENV)/.installed: Makefile
	$(PYTHON) -m venv $(KSERVE_VENV)
	$(KSERVE_VENV)/bin/pip install --quiet 'tritonclient[grpc]==2.73.0' kserve==0.21.0 grpcio==1.85.1 protobuf==6.33.6
	touch $@

$(OPENAI_VENV)/.installed: Makefile
	$(PYTHON) -m venv $(OPENAI_VENV)
	$(OPENAI_VENV)/bin/pip install --quiet openai==3.51.0 langchain-openai==1.7.4 haystack-ai==3.4.1 \
	  llama-index-embeddings-openai==0.7.0
	if command -v npm > /dev/null; then npm install --silent --no-audit --no-fund --prefix $(OPENAI_VENV)/npm openai@6.49.0; fi
	touch $@

$(ELMO_VENV)/.installed: Makefile
	$(PYTHON) -m venv $(ELMO_VENV)
	$(ELMO_VENV)/bin/pip install --quiet simple-elmo-pytorch==0.2 torch==2.13.0 h5py numpy
	touch $@

$(OLD_TRITON)/.installed: $(VENV)/bin/python Makefile
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(OLD_TRITON) triton==3.6.0
	touch $@

# One word for each task; `make help` lists them. Everything is installed into .venv.

PYTHON ?= python3
BIN := .venv/bin
WEIGHTS := weights/digits
STUDENT := weights/digits-4step
EMOJI := weights/emoji
# Huge pages: a tenth less time a step.
TRAIN := GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/python
DATA := $(WEIGHTS)/work/digits32.npz $(EMOJI)/work/emoji32.npz
# Two workers. Tests that share a server share a worker: tests/conftest.py. If a worker dies, the run ends, and says in which test.
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadgroup --max-worker-restart 0
# pyproject.toml has the range of torch; this is the release that was tested.
PIP := $(BIN)/python -m pip install --quiet --constraint requirements/torch.txt
SERVES := $(if $(shell command -v nvidia-smi),server,cpu)

.DEFAULT_GOAL := help
.PHONY: help serve test test-all check format data weights quality figures docs bench soak swagger lock audit image-test clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

serve: .venv/serve ## serve the weights in the box at http://127.0.0.1:8000 (settings: .venv/bin/stepwise serve --help)
	@exec $(BIN)/stepwise serve

test: .venv/develop ## run the quick tests, in five minutes
	$(PYTEST) -m 'not slow'

test-all: .venv/develop ## run all tests, with every example of the property tests: what CI runs
	$(PYTEST) --hypothesis-profile full

check: .venv/develop ## lint, formatting, types, who imports whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/develop ## mend what lint and formatting can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

data: $(DATA) ## build the training data (needs npm)

weights: .venv/develop $(DATA) ## train the weights in the box, and distil them; goes on after a break
	$(TRAIN) -m weights.train $(WEIGHTS)
	$(TRAIN) -m weights.distill $(STUDENT)
	$(TRAIN) -m weights.autoencode $(EMOJI)
	$(TRAIN) -m weights.train $(EMOJI)

quality: .venv/develop $(DATA) ## draw 3,000 images with each of the weights and judge them
	$(BIN)/python -m weights.quality $(WEIGHTS)
	$(BIN)/python -m weights.quality $(STUDENT)
	$(BIN)/python -m weights.quality $(EMOJI)

figures: .venv/develop $(DATA) ## measure the U-Nets' work, draw the pictures of docs/, and put measured figures into the documents
	$(BIN)/python -m bench.unet_macs --figure docs/unet.png
	$(BIN)/python -m weights.pictures $(WEIGHTS) $(STUDENT) docs
	$(BIN)/python -m weights.pictures $(EMOJI) docs
	$(BIN)/python -m weights.samplers $(WEIGHTS) docs/samplers.png --images 64
	$(BIN)/python -m bench.forward docs/forward.png
	$(BIN)/python -m bench.documents

docs: .venv/develop ## write the parts of docs/ that the program knows: the table of settings, whole answers
	$(BIN)/python -m bench.settings
	$(BIN)/python -m bench.answers

bench: .venv/bench ## compare with what people use now, an hour: bench/figures, and the documents that show them
	$(BIN)/python -m bench.serving
	$(BIN)/python -m bench.promises
	$(BIN)/python -m bench.throughput
	$(BIN)/python -m bench.cost
	$(BIN)/python -m bench.share
	$(BIN)/python -m bench.layers
	$(BIN)/python -m bench.start
	$(BIN)/python -m bench.documents

soak: .venv/develop ## ten minutes of clients that leave, nonsense and bursts: nothing may be lost, nothing may grow
	$(BIN)/python -m bench.soak

swagger: ## replace the Swagger UI of /docs by another version: make swagger SWAGGER=5.35.0 (needs npm)
	cd service/http/swagger && npm pack --silent swagger-ui-dist@$(SWAGGER) && \
	tar -xzf swagger-ui-dist-*.tgz --strip-components 1 \
	  $(addprefix package/,NOTICE swagger-ui.css swagger-ui-bundle.js swagger-ui-bundle.js.LICENSE.txt) && \
	sha256sum swagger-ui-bundle.js swagger-ui.css > SHA256SUMS && \
	gzip -9nf swagger-ui-bundle.js swagger-ui.css && rm swagger-ui-dist-*.tgz

lock: .venv/develop ## lock the newest dependencies that pyproject.toml admits, for the images: requirements/*.lock
	$(BIN)/uv pip compile --quiet --universal --fork-strategy fewest --generate-hashes --no-header \
	  --constraint requirements/torch.txt --extra cpu pyproject.toml > .venv/all.lock
	@# One resolution in three files, which then agree: OpenVINO; torch, and what its CUDA build needs; the rest.
	@awk 'BEGIN {for (i = split("service cpu cuda", names, " "); i; i--) print "# Made by: make lock" > "requirements/" names[i] ".lock"} \
	  /^[a-z]/ {name = /^openvino/ ? "cpu" : /^(torch=|triton|cuda-|nvidia-)/ ? "cuda" : "service"} \
	  {print > "requirements/" name ".lock"}' .venv/all.lock

audit: .venv/develop ## look up known weaknesses of the locked dependencies, where PyPI's list of them can be reached
	@if $(BIN)/python -c 'import httpx; httpx.get("https://pypi.org/pypi/pip/24.0/json").raise_for_status()' 2> .venv/audit.log; then \
	  $(BIN)/python -m pip install --quiet 'pip-audit>=2.10,<3' && $(BIN)/pip-audit --disable-pip $(addprefix -r ,$(wildcard requirements/*.lock)); \
	else echo "skipped: PyPI's list of known weaknesses cannot be reached from here"; fi

image-test: .venv/develop ## build the image for the CPU, start it and draw with it (needs root, buildah and debootstrap)
	$(BIN)/python -m tests.image

clean: ## remove the environment and all caches, but no data or checkpoints
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(WEIGHTS)/work/digits32.npz: | .venv/develop
	$(BIN)/python -m weights.digits.prepare $@

$(EMOJI)/work/emoji32.npz: | .venv/develop
	$(BIN)/python -m weights.emoji.prepare $@

# What serves. The stamp's age against pyproject.toml decides.
.venv/serve: pyproject.toml requirements/torch.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("stepwise: Python 3.11 or newer is needed, and $(PYTHON) is " + sys.version.split()[0] + "; choose one: make PYTHON=python3.12 …")'
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@echo "installing into .venv; torch is large, the first time takes minutes"
	$(PIP) --editable '.[$(SERVES)]'
	@touch $@

# What also has the peers.
.venv/bench: .venv/develop
	$(PIP) --editable '.[cpu,dev,train,bench]'
	@touch $@

# What also tests, checks and trains.
.venv/develop: .venv/serve
	$(PIP) --editable '.[cpu,dev,train]'
	@touch $@

# One door to every tool. `make` lists what there is.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
PORT ?= 3306
export CARGO_TARGET_DIR := $(CURDIR)/target

.PHONY: help
help: ## This list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## (.*)/  make \1\t\2/' | expand -t 24

.PHONY: setup
setup: ## Install what this machine lacks (Debian packages, cargo-nextest), fetch the server's headers
	@tools/setup tests

.PHONY: build
build: ## target/release/cistern with the plugin beside it; installs what that needs
	@tools/setup
	@cargo build --release -p cistern
	@tools/plugin

.PHONY: run
run: build ## Serve ./data/bucket on 127.0.0.1:$PORT (3306) until Ctrl-C
	@exec target/release/cistern serve --bucket "file://$(CURDIR)/data/bucket" --data "$(CURDIR)/data" -- \
	  --port=$(PORT) --bind-address=127.0.0.1

.PHONY: test
test: build lint ## Everything that must hold before a change lands; what CI runs
	@tools/setup tests
	@tools/server tests
	@cargo nextest run --workspace --features bucket/s3,bucket/testkit --no-fail-fast

.PHONY: crash-test
crash-test: build ## 100 kills under load, 20 of them lose the data directory
	@cargo run --release -q -p acceptance --bin crash -- --cycles=100 --deletions=20

.PHONY: crash-test-s3
crash-test-s3: build ## The same on S3 (moto) while one request in twenty goes wrong
	@cargo build --release -q -p bucket --features s3,testkit --bin faulty-s3
	@cargo run --release -q -p acceptance --bin crash -- --cycles=100 --deletions=20 --faulty-s3=0.05

.PHONY: memory-soak
memory-soak: build ## Does a server keep to its memory? Ten times the data, in a cgroup (v1, root) of setting + 15 %; ARGS=--help
	@cargo run --release -q -p acceptance --bin memory -- $(ARGS)

.PHONY: lint
lint: ## Formatting, clippy, licences and advisories, the crate arrows
	@cargo fmt --all --check
	@cargo clippy --workspace --all-targets --features bucket/s3,bucket/testkit -q -- -D warnings
	@tools/tidy

.PHONY: fmt
fmt: ## Format all Rust code
	@cargo fmt --all

.PHONY: bench
bench: build ## Beside InnoDB and MyRocks, one table; ONLY=handler,cost chooses, ALL=1 is long, ARGS=--help teaches
	@cargo build --release -q -p bucket --features s3,testkit --bin faulty-s3
	@cargo run --release -q -p bench --bin bench -- $(if $(ONLY),--only=$(ONLY)) $(if $(ALL),--all) $(ARGS)

.PHONY: bench-sysbench
bench-sysbench: build ## sysbench on ours and on InnoDB in turn, three rounds, the ratio of medians
	@cargo run --release -q -p acceptance --bin sysbench

.PHONY: bench-micro
bench-micro: ## Single steps of the engine, in nanoseconds, by one thread and by two; ARGS=--help teaches
	@cargo run --release -q -p bench --bin bench-micro -- $(ARGS)

.PHONY: bench-requests
bench-requests: ## What the bucket is asked for when rows are written, counted on the engine alone
	@cargo run --release -q -p bench --bin bench-requests -- $(ARGS)

.PHONY: soak-writes
soak-writes: ## A write storm of MINUTES=30 on the engine alone, its commit latency by the second as table and picture
	@cargo run --release -q -p bench --bin soak-writes -- $(if $(MINUTES),--minutes=$(MINUTES)) $(ARGS)

.PHONY: bench-peers
bench-peers: ## The same steps beside BTreeMap, crossbeam-skiplist, fjall and RocksDB
	@tools/bench-peers

.PHONY: sim
sim: ## 1,000 seeds of the whole engine in one thread; a failing one prints how to replay it
	@cargo run --release -q -p sim -- --seeds 1000

.PHONY: server-tests
server-tests: build ## Every test of the server's own suites that is listed as passing
	@tools/server-tests all

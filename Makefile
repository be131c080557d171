# Everything a newcomer needs: `make setup`, `make demo`, `make test`. Each says what it does while it does it.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

export CARGO_TARGET_DIR ?= $(CURDIR)/target
# Shared by all checkouts of this user: the guest kernel, base images, the Python environment of demo and tests.
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/dormouse
export DORMOUSE_VENV ?= $(CACHE)/venv
export DORMOUSE_BIN ?= $(CARGO_TARGET_DIR)/release/dormouse
MUSL := x86_64-unknown-linux-musl

.PHONY: help setup build build-guided base demo test test-rust test-system lint clean

help: ## Show this list.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "  make %-13s %s\n", $$1, $$2 }'

setup: ## Install what is missing: Debian packages, guest kernel, Rust target, Python clients. Safe to repeat.
	@scripts/setup

build: setup ## Build the node, the VMM and the guest agent (release).
	@echo "==> building the guest agent and the VMM (static, $(MUSL))"
	@cargo build --release --locked --target $(MUSL) -p guest-agent -p vmm
	@echo "==> building dormouse"
	@cargo build --release --locked -p dormouse
	@install -m 0755 "$(CARGO_TARGET_DIR)/$(MUSL)/release/"{guest-agent,dormouse-vmm} "$(CARGO_TARGET_DIR)/release/"

build-guided: build ## Build the node once more, guided by a profile of its edge (load-tests/README.md): three times the wait.
	@scripts/build-guided

base: build ## Make the base image that Dockerfiles start from (once, about two minutes).
	@"$(DORMOUSE_BIN)" base

demo: base ## Watch a microVM sleep and wake on this machine.
	@"$(DORMOUSE_VENV)/bin/python" demo/demo.py "$(DORMOUSE_BIN)"

test: lint test-rust test-system ## All tests.

lint: build ## Formatting and lints.
	@echo "==> clippy"
	@cargo clippy --workspace --all-targets --all-features --locked -- -D warnings

test-rust: build ## Tests of the crates, the engine's with real guests.
	@echo "==> tests of the crates"
	@cargo test --workspace --all-features --locked --no-fail-fast

test-system: base ## Tests of the whole node with clients nobody here wrote.
	@echo "==> tests of the whole node"
	@"$(DORMOUSE_VENV)/bin/python" -m pytest tests

clean: ## Remove build results of this checkout (not the shared cache).
	@cargo clean

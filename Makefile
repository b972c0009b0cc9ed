# What this needs beside Rust and make is installed on the way, see tests/install-missing.
export PATH := $(PATH):$(HOME)/.cargo/bin

.PHONY: build test demo lint clean help

build: ## the release binary, target/release/gpu-handoff
	@tests/install-missing build
	cargo build --release --locked

test: ## every test: unit, vectors, refusals, linkage, shell scripts, lab
	@tests/all

demo: ## a VM takes the GPU and gives it back, in the lab
	@tests/lab/run tests/lab/scripts/demo.sh

lint: ## formatting, clippy, shell scripts, manual page
	@tests/install-missing build lint
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings
	tests/shellcheck
	mandoc -Tlint -W warning packaging/man/gpu-handoff.8

clean: ## remove target, with the lab's image
	cargo clean

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)

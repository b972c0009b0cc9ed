# What this needs beside Rust and make is installed on the way, see tests/install-missing.
export PATH := $(PATH):$(HOME)/.cargo/bin

.PHONY: build deb test test-package test-genuine release demo bench soak fuzz mutants lint structure generate clean help

build: ## the release binary, target/release/gpu-handoff
	@tests/install-missing build
	cargo build --release --locked

deb: ## the Debian package, target/deb/gpu-handoff_VERSION_amd64.deb
	@packaging/build

test: ## every test: unit, vectors, trees, linkage, shell scripts, manual page, package, lab
	@tests/all

test-package: ## the package: its scripts, built twice, piuparts and autopkgtest on Debian 12 and 13; set-up of the driver, killed, in the lab
	@tests/package/scripts
	@tests/package/twice
	@tests/package/release
	@tests/package/piuparts
	@tests/package/autopkgtest
	@tests/lab/run --timeout 1500 tests/lab/scripts/driver-killed.sh
	@tests/lab/run --timeout 1800 tests/lab/scripts/driver.sh compile

release: ## what a release publishes, in target/publish, and what to do with it
	@packaging/release

test-genuine: ## all that makes sense on NVIDIA's own driver, in the lab
	@tests/lab/all --genuine

demo: ## a VM takes the GPU and gives it back, in the lab; DRIVER=genuine: on NVIDIA's own driver
	@tests/lab/run --driver $(or $(DRIVER),stub) tests/lab/scripts/demo.sh

bench: ## how fast a handoff is, against the kernel's own part of it and others, in the lab; BENCHMARKS.md
	@tests/bench $(or $(ROUNDS),15)

soak: ## 200 random handoffs on two cards with random kills, in the lab; SEED=N repeats one
	@tests/lab/run --gpus 2 --timeout 14400 tests/lab/scripts/soak.sh 200 $(or $(SEED),$$(shuf -i 1-32767 -n 1))

fuzz: ## every parser of what others wrote, SECONDS=600 of processor time each
	@tests/fuzz $(SECONDS)

mutants: ## one mistake after the other in handoff, sys and gpu, and whether a test notices; hours; wants cargo-mutants and root
	@tests/mutants

lint: structure ## formatting, clippy, the house, shell scripts, manual page, completions, schemas, docs
	@tests/install-missing build lint
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets --all-features -- -D warnings
	tests/shellcheck
	tests/manual
	tests/completion
	tests/schemas
	tests/docs

structure: ## whether every file uses only what stands below it in ARCHITECTURE.md
	cargo test --locked --quiet --test structure

generate: ## the completions, and what the manual page has of the table of verbs
	cargo run --locked --quiet --package gpu-handoff-generate

clean: ## remove target, with the lab's image
	cargo clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)

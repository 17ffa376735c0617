#!/usr/bin/env bash
# bootstrap.sh: what xtask itself needs before cargo can build it: cargo and a C linker. Prints only what it does.
set -euo pipefail

if ! command -v cargo >/dev/null; then
  if [ -x "$HOME/.cargo/bin/cargo" ]; then
    echo "cargo is in $HOME/.cargo/bin, which is not in PATH; add it: export PATH=\"\$HOME/.cargo/bin:\$PATH\"" >&2
  else
    echo "cargo not found; install stable Rust 1.95 or newer (https://rustup.rs), then run make again" >&2
  fi
  exit 1
fi

if ! command -v cc >/dev/null; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "==> installing gcc and libc6-dev (the linker that cargo calls)"
    apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q gcc libc6-dev
  else
    echo "no C linker found; install one (Debian, as root: apt-get install gcc libc6-dev), then run make again" >&2
    exit 1
  fi
fi

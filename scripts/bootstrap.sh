#!/usr/bin/env bash
# bootstrap.sh: what xtask itself needs before cargo can build it: a recent cargo and a C linker. Says only what it does.
set -euo pipefail
wanted=1.95.0

fail() {
  echo "$1" >&2
  exit 1
}

# install WHY PACKAGE..: by apt as root, or says what to do by hand
install() {
  local why=$1
  shift
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    fail "$why; install it (Debian, as root: apt-get install $*), then run make again"
  fi
  echo "==> $why; apt-get install $*"
  apt-get update -q
  DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$@"
}

command -v cc >/dev/null || install "no C linker" gcc libc6-dev

command -v cargo >/dev/null || install "no cargo" cargo-web rustc-web ca-certificates

found=$(cargo --version | cut -d' ' -f2)
if [ "$(printf '%s\n' "$wanted" "$found" | sort -V | head -n 1)" != "$wanted" ]; then
  fail "cargo $found is too old; install stable Rust $wanted or newer (https://rustup.rs), then run make again"
fi

#!/usr/bin/env bash
# Compares the contract with that of main: a change that breaks callers fails. A checkout without main compares with HEAD.
set -euo pipefail
buf=$1
base=main
git rev-parse --quiet --verify "$base" >/dev/null || base=HEAD
if ! git cat-file -e "$base:proto/buf.yaml" 2>/dev/null; then
  echo "$base holds no contract yet: nothing to compare with"
  exit 0
fi
before=$(mktemp -d)
trap 'rm -rf "$before"' EXIT
git archive "$base" proto | tar -x -C "$before"
"$buf" breaking proto --against "$before/proto"

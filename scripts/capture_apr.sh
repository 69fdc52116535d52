#!/usr/bin/env bash
# Capture layers of the Rust engine apr as a dump tree: apr import, then apr trace.
#   scripts/capture_apr.sh CHECKPOINT_DIR OUTPUT_DIR [LAYERS, default 0..1]
# The prompt is apr's own, "What is 2+2?"; apr has no flag for another.
set -euo pipefail

if [[ $# -lt 2 || $# -gt 3 ]]; then
    echo "usage: $0 CHECKPOINT_DIR OUTPUT_DIR [LAYERS]" >&2
    exit 2
fi
if ! command -v apr > /dev/null; then
    echo "$0: apr is not on PATH; install it with: cargo install apr-cli" >&2
    exit 2
fi
checkpoint=$1 output=$2 layers=${3:-0..1}
if [[ -e $output ]]; then
    echo "$0: $output exists; give another output directory" >&2
    exit 2
fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

apr import "$checkpoint" --arch qwen2 -o "$scratch/model.apr"
apr trace "$scratch/model.apr" --save-tensor all --save-tensor-layers "$layers" \
    --save-tensor-dir "$scratch/dump"
mkdir -p "$(dirname "$output")"
mv "$scratch/dump" "$output"

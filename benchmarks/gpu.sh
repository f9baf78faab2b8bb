#!/usr/bin/env bash
# Checks and measures this repository on one NVIDIA H100 or H200, in at most eight minutes:
#   bash benchmarks/gpu.sh [--wheels=FOLDER] [--output=FOLDER] [--toy]
# PYTHON names the interpreter. See benchmarks/gpu.py and docs/speed.md.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" benchmarks/gpu.py "$@"

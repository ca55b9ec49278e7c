#!/usr/bin/env bash
# Type-checks the package. Its root is this repository, whatever the folder is called, so mypy is shown a folder in
# which it is called `mapet`. Arguments go to mypy: scripts/types.sh -p mapet.shared
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p .mypy_root && ln -sfn .. .mypy_root/mapet
rooms=(-p mapet.shared -p mapet.tokenize_stage -p mapet.train_stage -p mapet.quickstart -p mapet.studies -p mapet.throughput -m mapet -m mapet.cli)
MYPYPATH=.mypy_root exec "${PYTHON:-.venv/bin/python}" -m mypy "${@:-${rooms[@]}}"

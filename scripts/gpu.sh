#!/usr/bin/env bash
# Every figure of docs/performance.md that needs a GPU: gpu_check.py, then whole runs with
# masked attention and with FlexAttention. Prints one JSON line per figure, and writes them to FOLDER as well.
#
#   scripts/gpu.sh [FOLDER] [cuda|cpu]      cpu tries the script: one size, small batches, without FlexAttention
#
# PYTHON names the interpreter; by default that of .venv, else python3. Exits with 1 if a check failed.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=${1:-gpu-figures} device=${2:-cuda}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
mkdir -p "$folder" .gpu_root && ln -sfn .. .gpu_root/mapet  # the package is this repository, whatever its folder is called
export PYTHONPATH=$PWD/.gpu_root PYTHONUNBUFFERED=1

check=() speed=(--device "$device") attention=(sdpa flex)
if [ "$device" = cpu ]; then
    check=(--device cpu --size tiny --mode eager --batch 2 --pairs 1)
    speed+=(--size tiny --batch 8 --steps 6 --pairs 1 --no-compiled)
    attention=(sdpa)
fi
failed=0
"$python" benchmarks/gpu_check.py "${check[@]}" | tee "$folder/gpu_check.txt" || failed=1
for kernel in "${attention[@]}"; do
    "$python" benchmarks/train_speed.py "${speed[@]}" --set "execution.attention=$kernel" |
        tee "$folder/train_speed-$kernel.txt" || failed=1
done
exit $failed

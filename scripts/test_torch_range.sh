#!/usr/bin/env bash
# Runs the tests with the lowest and with the newest versions of all dependencies that pyproject.toml allows, each in a
# new virtual environment of about 6 GB that is deleted afterwards, and prints the end of pytest's output.
#
#   scripts/test_torch_range.sh [lowest] [newest] [-- PYTEST ARGUMENTS]
#
# "lowest" takes the lower bound of everything that pyproject.toml names, and the newest of what these need in turn.
# Logs stay in a temporary folder. Exits with 1 if tests failed in either environment.
set -euo pipefail
cd "$(dirname "$0")/.."

ranges=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do ranges+=("$1"); shift; done
[ $# -eq 0 ] || shift
[ ${#ranges[@]} -gt 0 ] || ranges=(lowest newest)

folder=$(mktemp -d -t mapet-range-XXXXXX)
trap 'rm -rf "$folder"/*/; rmdir --ignore-fail-on-non-empty "$folder"' EXIT
failed=0
for range in "${ranges[@]}"; do
  case $range in
    lowest) resolution=lowest-direct ;;
    newest) resolution=highest ;;
    *) echo "usage: $0 [lowest] [newest] [-- PYTEST ARGUMENTS]" >&2; exit 2 ;;
  esac
  python=$folder/$range/bin/python
  "${PYTHON:-python3}" -m venv "$folder/$range"
  "$python" -m pip install --quiet uv  # pip cannot choose the lowest versions
  "$python" -m uv pip install --quiet --python "$python" --resolution "$resolution" --editable '.[cpu,test]'
  "$python" -m pip list --quiet 2>/dev/null > "$folder/$range-versions.txt"
  "$python" -m pytest "$@" > "$folder/$range.log" 2>&1 || failed=1
  echo "$range: $(grep -E '^(torch|torchvision|timm|numpy|zarr) ' "$folder/$range-versions.txt" | tr -s ' \n' ' ')"
  sed -n '/short test summary info/,$p' "$folder/$range.log" | grep . || tail -n 5 "$folder/$range.log"
  rm -rf "${folder:?}/$range"
done
echo "Logs: $folder"
exit "$failed"

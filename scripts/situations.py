"""Prints a Markdown table of what the situations in `tests/situations` gave before and after a change.

git worktree add /tmp/before/mapet COMMIT
MAPET_OF=/tmp/before SITUATIONS_TABLE=before.jsonl pytest tests/situations
SITUATIONS_TABLE=after.jsonl pytest tests/situations
python scripts/situations.py before.jsonl after.jsonl
"""

import json
import sys


def read(file: str) -> dict[tuple[str, str], dict]:
    with open(file) as lines:
        return {(entry["file"], entry["name"]): entry for entry in map(json.loads, lines)}


def outcome(entry: dict | None) -> str:
    if entry is None:
        return "not run"
    end = "traceback" if entry["traceback"] else f"exit {entry['exit_code']}"
    return f"{'right' if entry['passed'] else 'wrong'}, {end}"


def main(before: str, after: str) -> None:
    was, now = read(before), read(after)
    print("| situation | before | after |\n| --- | --- | --- |")
    for (file, name), entry in sorted(now.items()):
        situation = entry["situation"].rstrip(".").replace("|", "\\|")
        variant = f" ({name[name.index('[') + 1 : -1]})" if "[" in name else ""
        print(f"| {situation}{variant} | {outcome(was.get((file, name)))} | {outcome(entry)} |")
    right = [sum(entry["passed"] for entry in entries.values()) for entries in (was, now)]
    print(f"\n{len(now)} situations: {right[0]} right before, {right[1]} after.")


if __name__ == "__main__":
    main(*sys.argv[1:])

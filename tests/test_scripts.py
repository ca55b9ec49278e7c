"""The scripts that contributors run by hand."""

import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parent.parent / "scripts"


def test_measure_code_counts_modules_lines_and_the_length_of_functions(tmp_path: Path):
    room = tmp_path / "shared"
    room.mkdir()
    (room / "__init__.py").write_text('"""A room."""\n')
    (room / "module.py").write_text("@cached\ndef long():\n    def short():\n        pass\n\n    return short\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_module.py").write_text("def test():\n    pass\n")
    command = [sys.executable, SCRIPTS / "measure_code.py", tmp_path]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.splitlines() if line.startswith("| ")]
    assert rows[0] == ["folder", "modules", "lines", "functions", "median", "90 %", "longest"]
    assert rows[2:] == [["shared", "1", "7", "2", "2", "6", "6"], ["all", "1", "7", "2", "2", "6", "6"]]


def test_the_range_script_refuses_a_range_that_it_does_not_know():
    result = subprocess.run([SCRIPTS / "test_torch_range.sh", "middle"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("usage:")

"""The benchmarks run, compare like with like, and say what they need."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def benchmark(name: str, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, BENCHMARKS / name, *options], capture_output=True, text=True)


def test_the_step_and_its_dense_mask_reference_have_the_same_loss():
    options = "--size tiny --batch 2 --pairs 1 --threads 1 --part dense --precision float32 --mode eager"
    result = benchmark("pretrain_step.py", *options.split())
    assert result.returncode == 0, result.stderr
    figure = json.loads(result.stdout)
    ours, theirs = figure["losses"]
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert 0 < figure["bytes_ratio"] < 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="says something else where there is a GPU")
def test_the_gpu_check_is_refused_in_one_sentence_without_a_gpu():
    result = benchmark("gpu_check.py")
    assert (result.returncode, result.stdout, len(result.stderr.splitlines())) == (1, "", 1)
    assert "CUDA device" in result.stderr

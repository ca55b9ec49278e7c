"""Freed memory is kept for the next tensor, on the CPU."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from mapet.shared.runtime.devices import choose_device
if sys.argv[1] == "chosen":
    choose_device("cpu")
for _ in range(10):
    torch.ones(10_000_000)
begun = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(10_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begun)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_a_tensor_gets_the_pages_of_the_one_before():
    ways = ("default", "chosen")
    faults = [int(subprocess.check_output([sys.executable, "-c", FAULTS, way])) for way in ways]
    assert faults[1] < faults[0] / 4

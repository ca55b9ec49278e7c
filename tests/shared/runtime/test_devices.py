"""Commands on the CPU keep freed memory for the next tensor; library calls leave the allocator alone."""

import platform
import subprocess

import pytest

from ...warm import warm_python

FAULTS = """
import contextlib, resource, sys
import torch
from mapet.shared.runtime.console import running_command
from mapet.shared.runtime.devices import choose_device
with running_command() if sys.argv[1] == "command" else contextlib.nullcontext():
    choose_device("cpu")
for _ in range(10):
    torch.ones(10_000_000)
begun = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(10_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begun)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_a_tensor_of_a_command_gets_the_pages_of_the_one_before():
    library, command = (
        int(subprocess.check_output([*warm_python(), "-c", FAULTS, caller])) for caller in ("library", "command")
    )
    assert command < library / 4

"""What bounds a run, from given rates: no measurement is involved."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mapet.throughput.verdict import Machine, of_tokenizing, of_training, tokenizing_shares

CPU = Machine(
    device="cpu",
    cores=8,
    workers=0,
    loader=1200,
    step=100,
    encode=90,
    tower=100,
    assignment=10_000,
    share_of_limit=0.7,
    precision="float32",
    compiled=False,
)
GPU = replace(CPU, device="cuda", workers=4, precision="bfloat16", compiled=True)
RATE = st.floats(1e-3, 1e7)
MACHINES = st.builds(
    Machine,
    device=st.sampled_from(["cpu", "cuda"]),
    cores=st.integers(1, 256),
    workers=st.integers(0, 64),
    loader=RATE,
    step=RATE,
    encode=RATE,
    tower=RATE,
    assignment=RATE,
    share_of_limit=st.floats(0.001, 1),
    precision=st.sampled_from(["float32", "bfloat16"]),
    compiled=st.booleans(),
    faiss_gpus=st.integers(0, 8),
)


def text(verdict) -> str:
    return " ".join(verdict.sentences)


@given(MACHINES)
def test_the_slower_side_bounds_training(machine):
    verdict = of_training(machine)
    assert verdict.bound == ("loader" if machine.loader < machine.step else "step")
    assert verdict.sentences[0].startswith(f"Training here is bound by the {verdict.bound}: ")


@given(MACHINES, st.floats(1.01, 1000))
def test_a_faster_loader_never_makes_the_loader_the_bound(machine, factor):
    faster = replace(machine, loader=machine.loader * factor)
    if of_training(machine).bound == "step":
        assert of_training(faster).bound == "step"


@given(MACHINES)
def test_the_shares_of_tokenizing_are_shares_and_the_largest_is_the_bound(machine):
    shares = tokenizing_shares(machine)
    assert sum(shares.values()) == pytest.approx(1)
    assert min(shares.values()) >= 0
    bound = of_tokenizing(machine).bound
    assert shares[bound] == max(shares.values()) or (bound == "decoding" and machine.workers)


@given(MACHINES)
def test_proposed_workers_are_more_than_now_and_no_more_than_cores(machine):
    said = text(of_training(machine)) + text(of_tokenizing(machine))
    for proposed in re.findall(r"Set (?:--set data\.workers=|--workers )(\d+)", said):
        assert machine.device == "cuda"
        assert machine.workers < int(proposed) <= machine.cores


def test_a_step_that_keeps_the_loader_idle():
    verdict = of_training(CPU)
    assert verdict.bound == "step"
    assert "the loader delivers 12 times the images that it takes" in text(verdict)
    assert "loading takes 8% of the time" in text(verdict)  # 1/1200 of 1/1200 + 1/100
    assert "execution.compile=true and --set train.precision=bfloat16" in text(verdict)


def test_nothing_that_is_set_already_is_proposed():
    assert "execution.compile" not in text(of_training(GPU))
    assert "train.precision" not in text(of_training(GPU))


def test_a_gpu_that_waits_for_four_workers():
    verdict = of_training(replace(GPU, loader=50))
    assert verdict.bound == "loader"
    assert "0.5 times what the step could take, which waits 50% of the time" in text(verdict)
    assert "Set --set data.workers=8 (now 4, 8 cores)" in text(verdict)


def test_a_gpu_that_waits_with_every_core_decoding():
    said = text(of_training(replace(GPU, loader=50, workers=8)))
    assert "All 8 cores decode already. Store the images smaller" in said


@pytest.mark.parametrize(
    ("change", "bound"),
    [
        ({}, "tower"),
        ({"encode": 20}, "decoding"),
        ({"encode": 40, "assignment": 50}, "assignment"),
        ({"workers": 4, "encode": 60}, "decoding"),  # the tower takes longer, but waits for decoding 4 of 10 seconds
    ],
)
def test_the_bound_of_tokenizing(change, bound):
    assert of_tokenizing(replace(CPU, **change)).bound == bound

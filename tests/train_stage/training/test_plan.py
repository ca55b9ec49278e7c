"""The learning rate of each step is timm's, to the last bit."""

from itertools import pairwise

import pytest
import torch
from mapet.train_stage.training.plan import Schedule
from timm.scheduler.cosine_lr import CosineLRScheduler

SCHEDULES = [
    Schedule(start=0, steps=97, warmup=10, warmup_lr=1e-6, lr=1.5e-3, min_lr=1e-5),
    Schedule(start=0, steps=50, warmup=0, warmup_lr=1e-6, lr=5e-4, min_lr=0.0),
    Schedule(start=97, steps=33, warmup=3, warmup_lr=1e-5, lr=7e-4, min_lr=1e-6),
]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_learning_rate_is_that_of_timms_scheduler(schedule: Schedule):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=schedule.lr)
    timm = CosineLRScheduler(
        optimizer,
        t_initial=schedule.steps - schedule.warmup,
        lr_min=schedule.min_lr,
        warmup_t=schedule.warmup,
        warmup_lr_init=schedule.warmup_lr,
        warmup_prefix=True,
        t_in_epochs=False,
    )
    rates = []
    for step in range(schedule.start, schedule.start + schedule.steps):
        timm.step_update(step - schedule.start)
        rates.append(schedule.lr_at(step))
        assert rates[-1] == optimizer.param_groups[0]["lr"]
    peak = schedule.warmup
    assert (rates[0] if schedule.warmup else schedule.warmup_lr, rates[peak]) == (schedule.warmup_lr, schedule.lr)
    assert all(later > earlier for earlier, later in pairwise(rates[: peak + 1]))
    assert all(later < earlier for earlier, later in pairwise(rates[peak:]))

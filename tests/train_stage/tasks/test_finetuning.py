"""A step of fine-tuning is that of a naive reference made of timm's parts."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mapet.shared.runtime.distributed import World
from mapet.train_stage.classification.labelled_set import labelled_set
from mapet.train_stage.classification.mixup import draw_mix
from mapet.train_stage.evaluation.labelled import labelled_images
from mapet.train_stage.model.shape import Shape
from mapet.train_stage.settings import FinetuneSettings, resolve_finetuning
from mapet.train_stage.tasks.finetuning import FinetuningTask
from mapet.train_stage.training.plan import make_plan
from mapet.train_stage.training.trainer import Trainer
from mapet.train_stage.weights.weights import Input, Weights
from timm.data.mixup import mixup_target
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2

SHAPE = Shape(dim=32, depth=3, heads=2, patch_size=8, image_size=32, k=0)
SETTINGS = [
    "train.batch_size=8",
    "train.epochs=2",
    "optimizer.warmup_epochs=0",
    "optimizer.lr=1e-3",
    "model.drop_path=0",
]


def task_of(chain, *overrides: str) -> FinetuningTask:
    settings: FinetuneSettings = resolve_finetuning(None, [*SETTINGS, *overrides], 32, Input().to_json())
    images = labelled_set(labelled_images(chain.images).records)
    return FinetuningTask(settings, SHAPE, images, [images.record(0)], torch.zeros(1, dtype=torch.int64))


def batch_of(task: FinetuningTask):
    return next(task.batches(iter([[(0, index) for index in range(8)]]), 0, pin_memory=False))


def largest_error(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).abs().max() / other.abs().max().clamp(min=1e-12)).item()


@pytest.mark.parametrize("step", range(4))
@pytest.mark.parametrize("freeze", [0, 2])
def test_loss_gradients_and_update_equal_a_reference_of_timms_parts(chain, step: int, freeze: int):
    task = task_of(chain, f"model.freeze={freeze}")
    settings = task.settings
    trainer = Trainer(task, task.new_model(), make_plan(settings, len(task.images)), World(), "cpu")
    batch = batch_of(task)
    tensors = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}

    before = _joined({name: tensor.clone() for name, tensor in tensors.items()})
    reference = Weights(Path("x"), SHAPE, tensors).vit().train()
    frozen = ("cls_token", "pos_embed", "patch_embed", "blocks.0.", "blocks.1.") if freeze else ()
    for name, parameter in reference.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    optimizer = create_optimizer_v2(
        reference, opt="adamw", lr=settings.optimizer.lr, weight_decay=0.05, layer_decay=settings.optimizer.layer_decay
    )
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (settings.data.mean, settings.data.std))
    images = (batch.pixels.float() / 255 - mean) / std
    swapped = torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])
    mix = draw_mix(settings.augment, 32, settings.train.seed, step)
    if mix.box is None:
        images = images * mix.share + images[swapped] * (1 - mix.share)
    else:
        top, bottom, left, right = mix.box
        images[:, :, top:bottom, left:right] = images[swapped][:, :, top:bottom, left:right]
    one_hot = mixup_target(batch.classes, len(task.names), 1.0, 0.1)
    loss = SoftTargetCrossEntropy()(reference(images), one_hot * mix.share + one_hot[swapped] * (1 - mix.share))
    loss.backward()
    gradients = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}

    inputs = trainer.loss.at_step(step, 100)
    ours, _ = trainer.loss(batch, inputs)
    ours.backward()
    assert ours.item() == pytest.approx(loss.item(), rel=1e-6)
    joined = _joined({name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None})
    assert joined.keys() == gradients.keys()
    scale = max(gradient.abs().max() for gradient in gradients.values())
    assert all((joined[name] - gradient).abs().max() / scale < 1e-6 for name, gradient in gradients.items())

    trainer.optimizer.zero_grad()
    for group in optimizer.param_groups:
        low, high = settings.optimizer.min_lr, settings.optimizer.lr
        cosine = low + (high - low) * (1 + math.cos(math.pi * step / trainer.plan.steps)) / 2
        group["lr"] = cosine * group["lr_scale"]
    # Adam's first update divides a gradient by itself, which would only show its sign; give it its own gradients.
    for name, parameter in reference.named_parameters():
        if parameter.grad is not None:
            parameter.grad.copy_(joined[name])
    optimizer.step()
    trainer.step(step, [batch])
    updated = _joined({name: p.detach() for name, p in trainer.model.named_parameters()})
    for name, parameter in reference.named_parameters():
        assert largest_error(updated[name], parameter.detach()) < 1e-6, name
        assert torch.equal(updated[name], before[name]) == name.startswith(frozen), name


def _joined(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """q and kv as timm's qkv."""
    joined = {}
    for name, tensor in tensors.items():
        if ".attn.q." in name:
            joined[name.replace(".q.", ".qkv.")] = torch.cat([tensor, tensors[name.replace(".q.", ".kv.")]])
        elif ".attn.kv." not in name:
            joined[name] = tensor
    return joined


def test_accumulation_does_not_change_a_step(chain):
    whole, parts = task_of(chain), task_of(chain, "execution.micro_batch=3")
    assert make_plan(parts.settings, len(parts.images), 1, 2).micro_batch == 2
    batch = batch_of(whole)
    results = []
    for task in (whole, parts):
        plan = make_plan(task.settings, len(task.images), 1, task.computed_together)
        trainer = Trainer(task, task.new_model(), plan, World(), "cpu")
        pieces = [
            replace(
                batch,
                **{
                    name: getattr(batch, name)[start : start + plan.micro_batch]
                    for name in ("index", "pixels", "classes", "uniform_draws")
                },
            )
            for start in range(0, 8, plan.micro_batch)
        ]
        metrics = trainer.step(0, pieces)
        results.append((float(metrics.loss), {name: p.detach() for name, p in trainer.model.named_parameters()}))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert metrics.lr == whole.settings.optimizer.lr


def test_drop_path_and_checkpointing_leave_the_gradients_as_they_are(chain):
    gradients = []
    for overrides in ((), ("execution.grad_checkpointing=true",)):
        task = task_of(chain, "model.drop_path=0.5", *overrides)
        model = task.new_model()
        loss, _ = (made := task.loss(model, "cpu", "float32"))(batch_of(task), made.at_step(0, 10))
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_samples_do_not_depend_on_workers_or_batches(chain):
    task = task_of(chain)
    places = [[(1, 3), (0, 5)], [(1, 4), (2, 5)]]
    here = list(task.batches(iter(places), 0, pin_memory=False))
    there = list(task.batches(iter(places), 2, pin_memory=False))
    alone = [next(task.batches(iter([[place]]), 0, pin_memory=False)) for part in places for place in part]
    assert all(
        torch.equal(a.pixels, b.pixels) and torch.equal(a.uniform_draws, b.uniform_draws)
        for a, b in zip(here, there, strict=True)
    )
    assert torch.equal(torch.cat([batch.pixels for batch in here]), torch.cat([batch.pixels for batch in alone]))

"""A step of fine-tuned segmentation is that of a naive reference, however its batch is divided."""

import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from mapet.quickstart.drawings import write_drawings
from mapet.shared.runtime.distributed import World
from mapet.shared.sources.options import DEFAULT
from mapet.train_stage.data.color_jitter import jitter
from mapet.train_stage.masked.batch import MaskedBatch
from mapet.train_stage.masked.data import SegmentationData, read_data
from mapet.train_stage.masked.masks import IGNORED, MaskRule
from mapet.train_stage.model.shape import Shape
from mapet.train_stage.settings import resolve_segmenting
from mapet.train_stage.tasks.segmenting import SegmentingTask
from mapet.train_stage.tasks.segmenting_loss import pixel_cross_entropy, right_shares
from mapet.train_stage.training.plan import make_plan
from mapet.train_stage.training.trainer import Trainer
from mapet.train_stage.weights.weights import Input

SHAPE = Shape(dim=32, depth=2, heads=2, patch_size=8, image_size=32, k=0)
SETTINGS = ["train.batch_size=6", "train.epochs=2", "optimizer.warmup_epochs=0", "optimizer.lr=1e-3"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> SegmentationData:
    folder: Path = tmp_path_factory.mktemp("drawings")
    write_drawings(folder, 12, seed=4, masks=True)
    return read_data(folder, folder, DEFAULT, "seg.png", MaskRule(), 0)


def task_of(data: SegmentationData, *overrides: str) -> SegmentingTask:
    asked = [*SETTINGS, "model.channels=32", *overrides]
    return SegmentingTask(resolve_segmenting(None, asked, 32, Input().to_json()), SHAPE, data)


def batch_of(task: SegmentingTask) -> MaskedBatch:
    return next(task.batches(iter([[(0, index) for index in range(6)]]), 0, pin_memory=False))


def pieces(batch: MaskedBatch, size: int) -> list[MaskedBatch]:
    return [
        replace(batch, **{field.name: getattr(batch, field.name)[at : at + size] for field in fields(batch)})
        for at in range(0, 6, size)
    ]


def trainer_of(task: SegmentingTask) -> Trainer[MaskedBatch]:
    plan = make_plan(task.settings, len(task.images), 1, task.computed_together)
    return Trainer(task, task.new_model(), plan, World(), "cpu")


@pytest.mark.parametrize("freeze", [0, 2])
def test_loss_gradients_and_update_equal_a_naive_reference(data, freeze: int):
    task = task_of(data, f"model.freeze={freeze}", "model.drop_path=0")
    settings, batch = task.settings, batch_of(task)
    assert (batch.mask == IGNORED).any()  # of a small image
    reference = task.new_model()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (settings.data.mean, settings.data.std))
    images = (jitter(batch.pixels.float(), batch.jitter_factors, batch.jitter_order) / 255 - mean) / std
    outputs = reference(images, None, (batch.channel_draws >= 0.1).float() / 0.9)
    loss = torch.tensor(0.0, dtype=torch.float64)
    for logits, weight in zip(outputs, (1, 0.4), strict=True):
        whole = torch.nn.functional.interpolate(logits, (32, 32), mode="bilinear").double()
        for image, mask in zip(whole, batch.mask, strict=True):
            known = mask != IGNORED
            probability = image.softmax(0)[:, known].gather(0, mask[known].long()[None])
            loss = loss - weight * probability.log().sum() / (6 * 32 * 32)
    loss.backward()

    trainer = trainer_of(task)
    ours, _ = trainer.loss(batch, trainer.loss.at_step(0, 4))
    ours.backward()
    assert ours.item() == pytest.approx(loss.item(), rel=1e-6)
    gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    theirs = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    assert gradients.keys() == theirs.keys()
    scale = max(gradient.abs().max() for gradient in theirs.values())
    assert all((gradients[name] - gradient).abs().max() / scale < 1e-5 for name, gradient in theirs.items())

    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    rate = 1e-3 * (1 + math.cos(math.pi * 1 / 4)) / 2
    expected = {}
    for name, gradient in gradients.items():
        # AdamW by hand: in the first update both moments are those of this very gradient.
        layer = 0 if name.startswith(("cls_", "pos_", "patch_")) else 3
        layer = 1 + int(name.split(".")[1]) if name.startswith("blocks.") else layer
        lr = rate * 0.75 ** (3 - layer)
        decay = 0.05 if gradient.ndim > 1 and name not in ("cls_token", "pos_embed") else 0
        expected[name] = before[name] * (1 - lr * decay) - lr * gradient / (gradient.abs() + 1e-8)
    trainer.optimizer.zero_grad()
    trainer.step(1, [batch])
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in gradients), name
        if name in gradients:
            steady = gradients[name].abs() > 1e-6  # elsewhere a gradient is no more than rounding
            assert torch.allclose(parameter[steady], expected[name][steady], rtol=1e-5, atol=1e-7), name
    frozen = {name.split(".")[0] for name in before.keys() - gradients.keys()}
    assert frozen == ({"patch_embed", "cls_token", "pos_embed", "blocks"} if freeze else set())


def test_accumulation_does_not_change_a_step(data):
    """Parts of a batch ignore different numbers of pixels, and the norms of an image do not depend on the others."""
    results = []
    for micro_batch in (6, 2):
        task = task_of(data, f"execution.micro_batch={micro_batch}")
        trainer = trainer_of(task)
        metrics = trainer.step(0, pieces(batch_of(task), micro_batch))
        results.append((float(metrics.loss), float(metrics.gradient_norm), float(metrics.right[0])))
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_checkpointing_leaves_the_gradients_as_they_are(data):
    gradients = []
    for overrides in ((), ("execution.grad_checkpointing=true",)):
        task = task_of(data, "model.drop_path=0.5", *overrides)
        model = task.new_model()
        loss, _ = (made := task.loss(model, "cpu", "float32"))(batch_of(task), made.at_step(0, 4))
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_samples_do_not_depend_on_workers_or_batches(data):
    task = task_of(data)
    places = [[(1, 3), (0, 5)], [(1, 4), (2, 5)]]
    here = list(task.batches(iter(places), 0, pin_memory=False))
    there = list(task.batches(iter(places), 1, pin_memory=False))
    alone = [next(task.batches(iter([[place]]), 0, pin_memory=False)) for part in places for place in part]
    for field in fields(MaskedBatch):
        values = [torch.cat([getattr(batch, field.name) for batch in found]) for found in (here, there, alone)]
        assert torch.equal(values[0], values[1])
        assert torch.equal(values[0], values[2])
    assert not torch.equal(alone[1].pixels, alone[3].pixels)  # another epoch of the same image


def test_ignored_pixels_count_in_the_denominator_only():
    logits, truth = torch.zeros(2, 4, 2, 2), torch.tensor([[[0, IGNORED], [IGNORED, IGNORED]], [[1, 1], [1, 1]]])
    assert pixel_cross_entropy(logits, truth).item() == pytest.approx(5 / 8 * math.log(4))
    assert right_shares(logits, truth).tolist() == [1, 0]
    assert right_shares(logits, torch.full((2, 2, 2), IGNORED)).tolist() == [0, 0]

"""Our fine-tuning step beside timm's own parts with the same augmentation. Prints one JSON line per image size.

python benchmarks/finetune_speed.py TAR [--size tiny] [--image-size 64] [--batch-size 64] [--workers 0] [--pairs 5]

TAR holds labelled photographs. A step loads a batch, augments it (random crop, flip, RandAugment, random erasing),
mixes it (Mixup, CutMix), and takes it through forward, backward and AdamW with layer-wise learning rates. timm's side
is `create_transform`, `create_loader`, `Mixup`, `VisionTransformer`, `SoftTargetCrossEntropy` and `create_optimizer_v2`
on the same bytes. Both take turns in one process, `steps` steps at a time. The ratio is ours / timm's images/s: of each
pair, the median, and the median for each second of processor time (on a machine that others use, too). With
`--part load`, both only load and augment; with `--part compute`, one batch is computed again and again.
"""

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from itertools import cycle
from typing import Annotated

import torch
import typer
from mapet.shared.runtime.console import running_command
from mapet.shared.runtime.distributed import World
from mapet.shared.sources.records import read_bytes
from mapet.train_stage.classification.labelled_set import LabelledSet, labelled_set
from mapet.train_stage.data.batch_order import global_batches
from mapet.train_stage.evaluation.labelled import labelled_images
from mapet.train_stage.model.shape import SIZES, Shape
from mapet.train_stage.settings import FinetuneSettings, resolve_finetuning
from mapet.train_stage.tasks.finetuning import FinetuningTask
from mapet.train_stage.training.plan import make_plan
from mapet.train_stage.training.trainer import Trainer
from mapet.train_stage.weights.weights import Input
from PIL import Image
from timm.data import Mixup, create_loader
from timm.loss import SoftTargetCrossEntropy
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from torch.utils.data import Dataset

PASSES = 1000
"""More epochs than anybody measures."""


def main(
    tar: str,
    part: Annotated[list[str], typer.Option(help="step, load or compute.")] = ["step"],  # noqa: B006
    size: str = "tiny",
    image_size: Annotated[list[int], typer.Option()] = [64],  # noqa: B006
    batch_size: int = 64,
    workers: int = 0,
    threads: int = 1,
    steps: int = 4,
    pairs: int = 5,
) -> None:
    torch.set_num_threads(threads)
    images = labelled_set(labelled_images(tar).records)
    for side in image_size:
        for one in part:
            overrides = [f"train.batch_size={batch_size}", f"train.epochs={PASSES}", f"data.workers={workers}"]
            overrides += ["execution.micro_batch=null", "model.drop_path=0.1"]
            settings = resolve_finetuning(None, overrides, side, Input().to_json())
            shape = Shape(*SIZES[size], patch_size=16, image_size=side, k=0)
            ours, theirs = Ours(settings, shape, images, one), Timms(settings, shape, images, one)
            about = {"part": one, "model": f"vit-{size}-16", "image_size": side, "batch_size": batch_size}
            about |= {"images": len(images), "workers": workers, "threads": threads, "steps": steps}
            print(json.dumps({"figure": "fine-tuning / timm, images/s", **about, **compare(ours, theirs, steps, pairs),
                              "target": "at least 1.0"}), flush=True)  # fmt: skip


def compare(ours: Callable[[], int], theirs: Callable[[], int], steps: int, pairs: int) -> dict:
    for side in (ours, theirs):
        side()
    measured = [(speeds(ours, steps), speeds(theirs, steps)) for _ in range(pairs)]
    mine, reference = (statistics.median(side[0] for side in column) for column in zip(*measured, strict=True))
    return {
        "ratio": round(statistics.median(a[0] / b[0] for a, b in measured), 3),
        "ratios": [round(a[0] / b[0], 3) for a, b in measured],
        "cpu_ratio": round(statistics.median(a[1] / b[1] for a, b in measured), 3),
        "images_per_second": round(mine, 1),
        "timm_images_per_second": round(reference, 1),
    }


def speeds(step: Callable[[], int], steps: int) -> tuple[float, float]:
    """Images per second, and images per second of all processors' time."""
    began, busy = time.perf_counter(), sum(os.times()[:4])
    images = sum(step() for _ in range(steps))
    return images / (time.perf_counter() - began), images / (sum(os.times()[:4]) - busy)


class Ours:
    """Steps as `mapet train finetune` takes them."""

    def __init__(self, settings: FinetuneSettings, shape: Shape, images: LabelledSet, part: str):
        task = FinetuningTask(settings, shape, images, [images.record(0)], torch.zeros(1, dtype=torch.int64))
        plan = make_plan(settings, len(images), 1, task.computed_together)
        self.trainer, self.at, self.part = Trainer(task, task.new_model(), plan, World(), "cpu"), 0, part
        order = ([(epoch, int(index)) for index in some] for epoch, some in global_batches(images, settings, 0))
        self.batches = task.batches(order, settings.data.workers, pin_memory=False)
        if part == "compute":
            self.batches = cycle([next(self.batches)])

    def __call__(self) -> int:
        batch = next(self.batches)
        if self.part != "load":
            float(self.trainer.step(self.at, [batch]).loss)
            self.at += 1
        return len(batch.index)


class Pictures(Dataset):
    """The same images, as timm's datasets give them: a PIL picture through `transform`, and its class."""

    transform: Callable | None = None

    def __init__(self, images: LabelledSet):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        picture = Image.open(BytesIO(read_bytes(self.images.record(index)))).convert("RGB")
        return self.transform(picture), int(self.images.classes[index])


class Timms:
    """Steps of timm's parts, as its training script puts them together."""

    def __init__(self, settings: FinetuneSettings, shape: Shape, images: LabelledSet, part: str):
        augment, data, optimizer = settings.augment, settings.data, settings.optimizer
        loader = create_loader(
            Pictures(images),
            (3, shape.image_size, shape.image_size),
            settings.train.batch_size,
            is_training=True,
            use_prefetcher=False,
            num_workers=data.workers,
            persistent_workers=data.workers > 0,
            scale=augment.crop_scale,
            ratio=augment.crop_ratio,
            hflip=augment.flip,
            color_jitter=None,
            auto_augment=augment.rand_augment,
            re_prob=augment.erasing,
            re_mode="pixel",
            interpolation=data.interpolation,
            mean=data.mean,
            std=data.std,
        )
        self.batches, self.part = endless(loader), part
        if part == "compute":
            self.batches = cycle([next(self.batches)])
        self.mixup = Mixup(
            augment.mixup,
            augment.cutmix,
            prob=augment.mix_probability,
            switch_prob=augment.mix_switch,
            label_smoothing=augment.label_smoothing,
            num_classes=len(images.names),
        )
        self.model = VisionTransformer(
            img_size=shape.image_size,
            patch_size=shape.patch_size,
            embed_dim=shape.dim,
            depth=shape.depth,
            num_heads=shape.heads,
            num_classes=len(images.names),
            init_values=0.1,
            global_pool="avg",
            drop_path_rate=settings.model.drop_path,
        ).train()
        self.optimizer = create_optimizer_v2(
            self.model,
            opt="adamw",
            lr=optimizer.lr,
            weight_decay=optimizer.weight_decay,
            layer_decay=optimizer.layer_decay,
            fused=True,
        )
        self.loss = SoftTargetCrossEntropy()

    def __call__(self) -> int:
        pixels, classes = next(self.batches)
        if self.part != "load":
            mixed, targets = self.mixup(pixels.clone(), classes)
            loss = self.loss(self.model(mixed), targets)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            loss.item()
        return len(classes)


def endless(loader: torch.utils.data.DataLoader) -> Iterator:
    while True:
        yield from loader


if __name__ == "__main__":
    with running_command():  # measured as the command runs, with its allocator settings
        typer.run(main)

"""Our loader beside bare decoding and beside the usual torchvision pipeline; how long a training step waits for data.

python benchmarks/loader.py TAR [--part bare] [--workers 1] [--jitter 0.4] [--crop center] [--pairs 7] [--passes 30]

TAR holds photographs. Parts: `bare` (images/s of our loader, over as many workers that read, decode, crop and resize
the same bytes with the same kernels and do nothing else), `usual` (over PIL, crop and bicubic resize, flip,
ColorJitter, ToTensor and Normalize in a DataLoader; ours draws the jitter and leaves the last three to the device),
`wait` (share of pre-training steps spent waiting for data). Ours and the reference take turns; one JSON line per
figure: the median of the pairs' ratios, their range, that of images for each second of processor time (on a machine
that others use, too), and the medians of images/s. Repeat an option for more values.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Annotated

import torch
import typer
from mapet.quickstart.demo import TOWER
from mapet.shared.images.views import CropBox
from mapet.shared.runtime.console import running_command
from mapet.shared.runtime.devices import choose_device
from mapet.shared.runtime.distributed import World
from mapet.shared.runtime.loader import batches
from mapet.shared.sources.records import read_bytes
from mapet.throughput.loading import BareLoad
from mapet.tokenize_stage.build_codebook import build_codebook
from mapet.tokenize_stage.encode_shards import encode_shards
from mapet.train_stage.data.batch import LoadBatch, load_batches
from mapet.train_stage.data.batch_order import global_batches
from mapet.train_stage.data.dataset import TokenisedImages
from mapet.train_stage.data.join import join
from mapet.train_stage.settings import Settings, resolve
from mapet.train_stage.tasks.pretraining import PretrainingModel
from mapet.train_stage.training.plan import make_plan
from mapet.train_stage.training.trainer import Trainer
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms import functional

Place = tuple[int, int]


def main(
    tar: str,
    part: Annotated[list[str], typer.Option()] = ["bare", "usual", "wait"],  # noqa: B006
    workers: Annotated[list[int], typer.Option()] = [1, 2],  # noqa: B006
    jitter: Annotated[list[float], typer.Option()] = [0.0, 0.4],  # noqa: B006
    crop: Annotated[list[str], typer.Option()] = ["random-resized"],  # noqa: B006
    batch_size: int = 64,
    size: Annotated[list[str], typer.Option(help="Of the models that wait.")] = ["tiny"],  # noqa: B006
    pairs: int = 7,
    passes: int = 30,
) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for how in crop:
            data = tokenised(tar, Path(folder, how), how)
            about = {"crop": how, "images": len(data), "batch_size": batch_size}
            for strength in jitter:
                settings = settings_of(strength, batch_size, passes)
                for count in workers:
                    named = {**about, "workers": count, "jitter": strength}
                    if "bare" in part:
                        measured = compare(Ours(data, settings, count), Bare(data, settings, count), pairs)
                        say("loader / bare decode, crop and resize, images/s", named, "at least 0.95", measured)
                    if "usual" in part:
                        measured = compare(Ours(data, settings, count), Usual(data, settings, count), pairs)
                        say("loader / torchvision pipeline, images/s", named, "at least 1.7", measured)
            if "wait" in part:
                for name in size:
                    for count in [0, *workers]:
                        named = {**about, "model": f"vit-{name}", "workers": count, "device": choose_device("auto")}
                        say("waiting for data / training step", named, "", waiting(data, name, count, batch_size))


def say(figure: str, about: dict, target: str, values: dict) -> None:
    print(json.dumps({"figure": figure, **about, **values, **({"target": target} if target else {})}), flush=True)


def tokenised(tar: str, folder: Path, crop: str) -> TokenisedImages:
    """The images with real tokens, of the small tower in the package."""
    build_codebook(tar, folder / "codebook", tower=f"local-dir:{TOWER}", k=64, restarts=1, patches=5000)
    views = {"crop": crop} if crop == "center" else {"crop": crop, "views": 2}
    return join(tar, encode_shards(tar, folder / "codebook", folder / "tokens", **views))


def settings_of(jitter: float, batch_size: int, epochs: int, model: str = "tiny") -> Settings:
    """A student of 224 pixels on the small tower's 8x8 grid."""
    grid = ["model.image_size=224", "model.patch_size=28", "optimizer.warmup_epochs=0"]
    more = [
        f"data.color_jitter={jitter}",
        "execution.micro_batch=null",
        f"train.batch_size={batch_size}",
        f"train.epochs={epochs}",
    ]
    return resolve(f"vit-{model}-16", [*grid, *more])


class Side:
    """One way to load the same images in the same order with `workers` processes; `run` gives their number."""

    def __init__(self, data: TokenisedImages, settings: Settings, workers: int):
        self.data, self.settings, self.workers = data, settings, workers
        batched = global_batches(data, settings, 0)
        self.places = [[(epoch, int(index)) for index in some] for epoch, some in batched]

    def view(self, index: int) -> tuple[bytes, CropBox, bool]:
        """Bytes, box and flip of an image's first view."""
        row = self.data.rows[index]
        box = CropBox(*self.data.crops[row, 0].tolist())
        return read_bytes(self.data.record(index)), box, bool(self.data.flips[row, 0])


class Ours(Side):
    def run(self) -> int:
        load = LoadBatch(self.data, self.settings)
        return sum(len(batch["pixels"]) for batch in batches(load, self.places, self.workers))


class Bare(Side):
    def run(self) -> int:
        load = BareLoad(self.data, self.settings.model.image_size)
        return sum(len(batch["index"]) for batch in batches(load, self.places, self.workers))


class Usual(Side, Dataset):
    def run(self) -> int:
        loader = DataLoader(
            self,
            batch_sampler=self.places,
            num_workers=self.workers,
            prefetch_factor=4 if self.workers else None,
            multiprocessing_context="fork" if self.workers else None,
        )
        return sum(len(pixels) for pixels in loader)

    def __getitem__(self, place: Place) -> torch.Tensor:
        content, box, flip = self.view(place[1])
        size, strength = [self.settings.model.image_size] * 2, self.settings.data.color_jitter
        image = Image.open(BytesIO(content)).convert("RGB")
        image = functional.resized_crop(image, *map(round, box), size, functional.InterpolationMode.BICUBIC)
        image = functional.hflip(image) if flip else image
        if strength:
            image = transforms.ColorJitter(strength, strength, strength)(image)
        return functional.normalize(functional.to_tensor(image), self.settings.data.mean, self.settings.data.std)


def compare(ours: Side, theirs: Side, pairs: int) -> dict:
    """Images/s of both in turn, after one pass of each over the first batches."""
    for side in (ours, theirs):
        places, side.places = side.places, side.places[:2]
        side.run()
        side.places = places
    measured = [(speeds(ours.run), speeds(theirs.run)) for _ in range(pairs)]
    ratios = sorted(mine[0] / reference[0] for mine, reference in measured)
    cpu_ratios = [mine[1] / reference[1] for mine, reference in measured]
    mine, reference = (statistics.median(side[0] for side in column) for column in zip(*measured, strict=True))
    return {
        "ratio": round(statistics.median(ratios), 3),
        "range": [round(ratios[0], 3), round(ratios[-1], 3)],
        "cpu_ratio": round(statistics.median(cpu_ratios), 3),
        "images_per_second": round(mine, 1),
        "reference_images_per_second": round(reference, 1),
    }


def speeds(run: Callable[[], int]) -> tuple[float, float]:
    """Images per second, and images per second of all processors' time, which others on the machine disturb less."""
    began, busy = time.perf_counter(), sum(os.times()[:4])
    images = run()
    return images / (time.perf_counter() - began), images / (sum(os.times()[:4]) - busy)


def waiting(data: TokenisedImages, model: str, workers: int, batch_size: int, steps: int = 12) -> dict:
    """Share of the time of steps 3, 4, ... in which the loop stood still for its next batch."""
    device = choose_device("auto")
    settings = settings_of(0.4, batch_size, 1 + steps * batch_size // len(data), model)
    plan = make_plan(settings, len(data))
    task = PretrainingModel(settings, 64)
    trainer = Trainer(task, task.new_model(), plan, World(), device)
    order = ([(epoch, int(index)) for index in some] for epoch, some in global_batches(data, settings, 0))
    loader = load_batches(LoadBatch(data, settings), order, workers, pin_memory=device == "cuda")
    waited, spent = [], []
    for step in range(steps):
        began = time.perf_counter()
        batch = next(loader)
        waited.append(time.perf_counter() - began)
        trainer.step(step, [batch])
        if device == "cuda":
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - began)
    return {
        "share": round(sum(waited[2:]) / sum(spent[2:]), 4),
        "step_ms": round(1e3 * statistics.median(spent[2:]), 1),
        "images_per_second": round(batch_size / statistics.median(spent[2:]), 1),
    }


if __name__ == "__main__":
    with running_command():  # measured as the command runs, with its allocator settings
        typer.run(main)

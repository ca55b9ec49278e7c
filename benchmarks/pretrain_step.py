"""The pre-training step beside a dense-mask MaPeT and a plain timm ViT. Prints one JSON line per figure.

python benchmarks/pretrain_step.py [--sizes small] [--parts dense] [--precisions float32] [--modes eager] ...

A step is forward, loss and backward. Both sides have the same weights and data and run in one process, in turns;
ratios are medians over the pairs of (theirs / ours), so above 1 is faster than theirs.
"""

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated

import timm
import torch
import typer
from dense_reference import DenseMaPeT, build_masks
from mapet.train_stage.loss import token_loss
from mapet.train_stage.model import SIZES, MaPeT, Shape
from mapet.train_stage.objectives import make_layout
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

K, VISIBLE, PATCHES = 8192, 49, 196
Step = Callable[[], Tensor]


def main(
    sizes: Annotated[list[str], typer.Option()] = ["small", "base"],  # noqa: B006
    parts: Annotated[list[str], typer.Option(help="dense, floor, memory, masks")] = ["dense", "floor", "masks"],  # noqa: B006
    precisions: Annotated[list[str], typer.Option()] = ["float32", "bfloat16"],  # noqa: B006
    modes: Annotated[list[str], typer.Option()] = ["eager", "compiled"],  # noqa: B006
    batch: int = 8,
    threads: int = 2,
    pairs: int = 5,
) -> None:
    torch.set_num_threads(threads)
    for size in sizes:
        batch_of = Batch(size, batch)
        for part in parts:
            if part == "masks":
                say(size, "cost of dense masks", **masks(batch_of))
                continue
            for precision in precisions:
                for mode in modes:
                    measure = {"dense": dense, "floor": floor}[part]
                    say(size, part, precision=precision, mode=mode, **measure(batch_of, precision, mode, pairs))


def say(size: str, figure: str, **values) -> None:
    print(json.dumps({"figure": figure, "model": f"vit-{size}-16", **values}), flush=True)


class Batch:
    """A model and one batch of random data, in the forms that each side takes."""

    def __init__(self, size: str, images: int):
        torch.manual_seed(0)
        self.size = size
        dim, depth, self.heads = SIZES[size]
        self.model = MaPeT(Shape(dim, depth, self.heads, patch_size=16, image_size=224, k=K)).train()
        self.images = torch.randn(images, 3, 224, 224)
        self.tokens = torch.randint(K, (images, PATCHES))
        self.order = torch.stack([torch.randperm(PATCHES) for _ in range(images)])
        self.hidden = self.order[:, VISIBLE:].sort(1).values
        self.masks = tuple(map(torch.stack, zip(*(self.masks_of(order) for order in self.order), strict=True)))

    def masks_of(self, order: Tensor) -> tuple[Tensor, Tensor]:
        return build_masks(order, VISIBLE, self.heads)

    def ours(self, mode: str, chunk: int | None = 256) -> Step:
        if mode == "compiled":
            for block in self.model.blocks:
                block.compile()
        else:
            for block in self.model.blocks:
                block._compiled_call_impl = None
        layout = make_layout("mapet", PATCHES, VISIBLE)
        targets = self.tokens.gather(1, self.order[:, VISIBLE:])

        def step() -> Tensor:
            rows = self.model.predict_rows(self.images, self.order, layout)
            return token_loss(rows, self.model.decoder, targets, chunk)[0]

        return step

    def dense(self, mode: str) -> Step:
        reference = DenseMaPeT(self.model)
        forward = torch.compile(reference) if mode == "compiled" else reference
        return partial(forward, self.images, self.hidden, self.masks, self.tokens.gather(1, self.hidden))

    def plain(self, mode: str) -> Step:
        """timm's ViT with an 8192-way head on the rows of as many patches as we predict."""
        model = timm.create_model(
            f"vit_{self.size}_patch16_224", num_classes=0, init_values=0.1, class_token=True, global_pool=""
        )
        head = nn.Linear(model.embed_dim, K)
        index = 1 + self.hidden[:, :, None].expand(-1, -1, model.embed_dim)
        targets = self.tokens.gather(1, self.hidden).flatten()

        def forward(images: Tensor) -> Tensor:
            logits = head(model(images).gather(1, index))
            return cross_entropy(logits.float().flatten(0, 1), targets)

        return partial(torch.compile(forward) if mode == "compiled" else forward, self.images)


def dense(batch: Batch, precision: str, mode: str, pairs: int) -> dict:
    ours, theirs = batch.ours(mode), batch.dense(mode)
    loss, reference = (under(precision, step)().item() for step in (ours, theirs))
    times = interleaved(under(precision, ours), under(precision, theirs), pairs)
    bytes_ = [saved_bytes(under(precision, step)) for step in (ours, theirs)]
    return {
        **times,
        "bytes_ratio": round(bytes_[0] / bytes_[1], 3),
        "our_saved_mb": bytes_[0] >> 20,
        "losses": [loss, reference],
    }


def floor(batch: Batch, precision: str, mode: str, pairs: int) -> dict:
    ours, theirs = (under(precision, step) for step in (batch.ours("eager"), batch.plain("eager")))
    flops = [count_flops(step) for step in (ours, theirs)]
    ours, theirs = (under(precision, step) for step in (batch.ours(mode), batch.plain(mode)))
    times = interleaved(ours, theirs, pairs)
    ratio = flops[0] / flops[1]
    return {**times, "flop_ratio": round(ratio, 3), "time_per_flop_vs_timm": round(1 / times["ratio"] / ratio, 3)}


def masks(batch: Batch) -> dict:
    built = [seconds(lambda: batch.masks_of(batch.order[0])) for _ in range(20)]
    megabytes = sum(mask[0].nbytes for mask in batch.masks) / 2**20
    return {"build_ms_an_image": round(1e3 * statistics.median(built), 2), "mb_an_image": round(megabytes, 2)}


def under(precision: str, step: Step) -> Step:
    def run() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            return step()

    return run


def interleaved(ours: Step, theirs: Step, pairs: int) -> dict:
    for step in (ours, theirs):
        step().backward()
    times = [(seconds(lambda: ours().backward()), seconds(lambda: theirs().backward())) for _ in range(pairs)]
    return {
        "ratio": round(statistics.median(b / a for a, b in times), 3),
        "our_ms": round(1e3 * statistics.median(a for a, _ in times)),
        "their_ms": round(1e3 * statistics.median(b for _, b in times)),
    }


def seconds(run: Callable) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def saved_bytes(step: Step) -> int:
    """Bytes of distinct storages kept for backward, parameters and inputs aside."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not (tensor.is_leaf and tensor.requires_grad):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = step()
    del loss
    return sum(kept.values())


def count_flops(step: Step) -> int:
    with FlopCounterMode(display=False) as counter:
        step().backward()
    return counter.get_total_flops()


if __name__ == "__main__":
    typer.run(main)

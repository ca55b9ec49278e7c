"""Pre-training steps to be timed: ours, the dense-mask reference and a plain timm ViT, on one batch of random data."""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from dense_reference import DenseMaPeT, build_masks
from mapet.throughput.training import PlainViT
from mapet.train_stage.data.batch import Batch as TrainingBatch
from mapet.train_stage.model.mapet import MaPeT
from mapet.train_stage.model.shape import SIZES, Shape
from mapet.train_stage.objectives.layouts import make_layout
from mapet.train_stage.objectives.token_loss import token_loss
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

K, VISIBLE, PATCHES = 8192, 49, 196
CHUNK = 4096
Step = Callable[[], Tensor]


class Batch:
    """A ViT/16 at 224 pixels and a batch of random data, in the form that each side takes."""

    def __init__(self, size: str, images: int, device: str = "cpu"):
        torch.manual_seed(0)
        self.size, self.device = size, device
        dim, depth, self.heads = SIZES[size]
        self.model = MaPeT(Shape(dim, depth, self.heads, patch_size=16, image_size=224, k=K)).train().to(device)
        self.images = torch.randn(images, 3, 224, 224).to(device)
        self.tokens = torch.randint(K, (images, PATCHES)).to(device)
        order = torch.stack([torch.randperm(PATCHES) for _ in range(images)])
        built = zip(*(self.build_masks(one) for one in order), strict=True)
        self.masks = tuple(torch.stack(part).to(device) for part in built)
        self.order = order.to(device)
        self.hidden = self.order[:, VISIBLE:].sort(1).values

    def build_masks(self, order: Tensor) -> tuple[Tensor, Tensor]:
        return build_masks(order, VISIBLE, self.heads)

    def ours(self, mode: str = "eager", chunk: int | None = CHUNK, checkpointing: bool = False) -> Step:
        """`mode` is eager, compiled, or flex: compiled with FlexAttention, which has no backward pass on the CPU."""
        # Compiling is undone by building the model anew with the same weights.
        model = MaPeT(self.model.shape).train().to(self.device)
        model.load_state_dict(self.model.state_dict())
        model.grad_checkpointing = checkpointing
        if mode != "eager":
            for block in model.blocks:
                block.compile()
        layout = make_layout("mapet", PATCHES, VISIBLE, device=self.device, flex=mode == "flex")
        targets = self.tokens.gather(1, self.order[:, VISIBLE:])

        def step() -> Tensor:
            return token_loss(model.predict_rows(self.images, self.order, layout), model.decoder, targets, chunk)[0]

        step.parameters = list(model.parameters())
        return step

    def dense(self, mode: str = "eager") -> Step:
        reference = DenseMaPeT(self.model)
        forward = reference if mode == "eager" else torch.compile(reference)
        step = partial(forward, self.images, self.hidden, self.masks, self.tokens.gather(1, self.hidden))
        step.parameters = list(reference.parameters())
        return step

    def plain(self, mode: str = "eager") -> Step:
        """timm's ViT with an 8192-way head on the rows of as many patches as MaPeT predicts."""
        model = PlainViT(self.model.shape).to(self.device)
        forward = model if mode == "eager" else torch.compile(model)
        return partial(forward, self.images, self.hidden, self.tokens.gather(1, self.hidden))


def training_batch(images: int, size: int = 224) -> TrainingBatch:
    """Random images of `size` pixels and their tokens, as the trainer of a ViT/16 of 12 blocks takes them."""
    patches = (size // 16) ** 2
    return TrainingBatch(
        index=torch.arange(images),
        pixels=torch.randint(256, (images, 3, size, size), dtype=torch.uint8),
        order=torch.stack([torch.randperm(patches) for _ in range(images)]),
        tokens=torch.randint(K, (images, patches)),
        uniform_draws=torch.rand(images, 12, 2),
    )


def under(precision: str, step: Step, device: str = "cpu") -> Step:
    def run() -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
            return step()

    return run


def seconds(run: Callable, device: str = "cpu") -> float:
    began = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def interleaved_seconds(ours: Callable, theirs: Callable, pairs: int, device: str) -> list[tuple[float, float]]:
    """Times of both in turns, after two of each that do not count."""
    for run in (ours, theirs):
        for _ in range(2):
            run()
    return [(seconds(ours, device), seconds(theirs, device)) for _ in range(pairs)]


def interleaved(ours: Step, theirs: Step, pairs: int, device: str = "cpu") -> dict:
    """Times of forward and backward in turns; ratio is the median of theirs / ours, above 1 where ours is faster."""
    times = interleaved_seconds(lambda: ours().backward(), lambda: theirs().backward(), pairs, device)
    return {
        "ratio": round(statistics.median(b / a for a, b in times), 3),
        "our_ms": round(1e3 * statistics.median(a for a, _ in times), 1),
        "their_ms": round(1e3 * statistics.median(b for _, b in times), 1),
        "pairs": pairs,
    }


def saved_bytes(step: Step) -> int:
    """Bytes of the distinct storages that a forward pass keeps for backward, parameters aside."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = step()
    del loss
    return sum(kept.values())


def peak_bytes(step: Step, device: str = "cpu") -> int:
    """How much more memory than before a forward and backward pass holds at its peak (gradients included)."""
    step().backward()
    for parameter in step.parameters:
        parameter.grad = None
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step().backward()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    before = _resident("VmRSS")
    step().backward()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def count_flops(step: Step) -> int:
    """Of forward and backward, as `torch.utils.flop_counter` counts them."""
    with FlopCounterMode(display=False) as counter:
        step().backward()
    return counter.get_total_flops()

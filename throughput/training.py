"""A pre-training step beside a plain ViT's, and beside a matrix product, which is what the device can do at most."""

from collections.abc import Callable
from dataclasses import replace

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..shared.images.normalise import Normalise
from ..shared.randomness import seeded_torch
from ..shared.runtime.distributed import World
from ..train_stage.data.batch import Batch
from ..train_stage.model.flops import training_flops
from ..train_stage.model.shape import Shape
from ..train_stage.objectives.layouts import step_layout
from ..train_stage.settings import Settings
from ..train_stage.tasks.pretraining import PretrainingModel
from ..train_stage.training.plan import make_plan
from ..train_stage.training.trainer import Trainer
from .rates import Side, timed

_SIDE, _SIDE_ON_GPU, _PRODUCTS_ON_GPU = 1536, 8192, 20


class PlainViT(nn.Module):
    """timm's ViT of a shape, with a K-way head on the rows of some patches."""

    def __init__(self, shape: Shape, drop_path: float = 0.0) -> None:
        super().__init__()
        self.trunk = VisionTransformer(
            img_size=shape.image_size,
            patch_size=shape.patch_size,
            embed_dim=shape.dim,
            depth=shape.depth,
            num_heads=shape.heads,
            mlp_ratio=shape.mlp_ratio,
            num_classes=0,
            init_values=0.1,
            global_pool="",
            drop_path_rate=drop_path,
        )
        self.head = nn.Linear(shape.dim, shape.k)

    def forward(self, images: Tensor, patches: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy at patches (B, P) of images (B, 3, S, S); targets (B, P) are tokens."""
        rows = self.trunk(images)
        predicted = rows.gather(1, 1 + patches[:, :, None].expand(-1, -1, rows.shape[-1]))
        return cross_entropy(self.head(predicted).float().flatten(0, 1), targets.flatten())


def plain_flops(shape: Shape, predicted: int) -> int:
    """FLOPs of forward and backward of `PlainViT` for one image with so many predicted patches."""

    def loss(model: PlainViT) -> Tensor:
        patches = torch.empty(1, predicted, dtype=torch.int64)
        entropy: Tensor = model(torch.empty(1, 3, shape.image_size, shape.image_size), patches, patches)
        return entropy

    return training_flops(lambda: PlainViT(shape), loss)


class Steps:
    """Optimizer steps on one batch that lies on the device: `ours` as the trainer takes them, `plain` of timm's ViT."""

    def __init__(self, settings: Settings, k: int, batch: Batch, device: str) -> None:
        """`batch` holds `train.batch_size` images. Raises UsageError for sizes that do not fit together."""
        self.settings, self.device = settings, device
        size = len(batch.index)
        plan = make_plan(settings, size)
        self.images, self.parts = size, plan.parts
        self.micro_batch = batch_part(batch, plan.micro_batch).to(device)
        self.task = PretrainingModel(settings, k)
        self._trainer = Trainer(self.task, self.task.new_model(), plan, World(), device)
        layout = step_layout(settings.objective, self.task.shape.patches, settings.train.seed, 0, plan.steps, device)
        self.visible, self.predicted = layout.visible, len(layout.ranks)
        self._plain_step = self._plain()

    def ours(self) -> Side:
        """A step of the trainer, in images."""
        parts = [self.micro_batch] * self.parts
        return timed(lambda: self._trainer.step(0, parts), self.images)

    def plain(self) -> Side:
        """Forward, backward, clipping and AdamW of `PlainViT` on as many images."""
        return timed(self._plain_step, self.images)

    def flops(self) -> tuple[int, int]:
        """FLOPs of forward and backward for one image: of the trainer's step, and of the plain one."""
        return self.task.flops_per_image(), plain_flops(self.task.shape, self.predicted)

    def _plain(self) -> Callable[[], None]:
        settings, data = self.settings, self.settings.data
        with seeded_torch(0):
            model = PlainViT(self.task.shape, settings.model.drop_path).to(self.device).train()
        forward = torch.compile(model) if settings.execution.compile else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
        images = Normalise(data.mean, data.std, self.device)(self.micro_batch.pixels.float().contiguous())
        patches = self.micro_batch.order[:, self.visible :][:, : self.predicted]
        targets = self.micro_batch.tokens[:, self.visible :][:, : self.predicted]
        lowered = settings.train.precision_on(self.device) == "bfloat16"

        def step() -> None:
            for _ in range(self.parts):
                with torch.autocast(self.device, torch.bfloat16, enabled=lowered):
                    loss = forward(images, patches, targets) / self.parts
                loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.optimizer.clip_grad or float("inf"))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step


def batch_part(batch: Batch, count: int) -> Batch:
    """The first `count` images of a batch."""
    return replace(batch, **{name: tensor[:count] for name, tensor in vars(batch).items() if tensor is not None})


def matrix_product(device: str, precision: str) -> Side:
    """A large square matrix product, in FLOPs: no step can do more of them per second."""
    side, count = (_SIDE_ON_GPU, _PRODUCTS_ON_GPU) if device == "cuda" else (_SIDE, 1)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    factor = torch.ones(side, side, dtype=dtype, device=device)
    result = torch.empty_like(factor)

    def multiply() -> None:
        for _ in range(count):
            torch.mm(factor, factor, out=result)

    return timed(multiply, 2.0 * side**3 * count)

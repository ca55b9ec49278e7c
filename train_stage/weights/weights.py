"""Weights between places: a ViT's tensors under the published names, and all that is needed to use them."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ...shared.errors import DataError, UsageError
from ...shared.images.views import Preprocess
from ...shared.storage.files import sha256_file
from ..model.mapet import MaPeT
from ..model.shape import SIZES, Shape

_PRETRAINING_ONLY = ("mask_positional_token", "decoder.weight", "decoder.bias")


@dataclass(frozen=True)
class Input:
    """What a model was shown: (pixel / 255 - mean) / std of images resized by `interpolation`."""

    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    interpolation: str = "bicubic"

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Input":
        """Raises KeyError, TypeError or ValueError if `fields` lack something or hold something else."""
        mean, std = (tuple(map(float, fields[name])) for name in ("mean", "std"))
        if len(mean) != 3 or len(std) != 3 or fields["interpolation"] not in ("bicubic", "bilinear"):
            raise ValueError(f"input {fields}")
        return cls(mean, std, fields["interpolation"])

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Weights:
    """The weights of a Vision Transformer, of one of three kinds.

    "pretraining": everything that MaPeT trains. "encoder": the same without decoder and mask embedding, which is what
    an export keeps. "classifier": a fine-tuned ViT, whose `fc_norm` and `head` follow the average over patches.
    """

    file: Path
    """Where the tensors were read from."""
    shape: Shape
    """`k` is 0 unless the kind is "pretraining"."""
    tensors: dict[str, Tensor]
    """float32 on the CPU, under the names of the published checkpoints."""
    input: Input = field(default_factory=Input)
    seed: int = 0
    """Of the run, if there was one."""

    @property
    def kind(self) -> str:
        if "head.weight" in self.tensors:
            return "classifier"
        return "pretraining" if "decoder.weight" in self.tensors else "encoder"

    @property
    def classes(self) -> int:
        """How many classes the head tells apart; 0 if there is none."""
        return len(self.tensors["head.weight"]) if self.kind == "classifier" else 0

    @property
    def grid(self) -> int:
        """Patches along one side of an image."""
        return self.shape.image_size // self.shape.patch_size

    @property
    def preprocess(self) -> Preprocess:
        """The whole image resized to the model's size, then its centre."""
        size = self.shape.image_size
        return Preprocess(size, "shortest", size, self.input.interpolation, self.input.mean, self.input.std)

    def sha256(self) -> str:
        """Of the file that the tensors were read from."""
        return sha256_file(self.file)

    def resized(self, image_size: int | None) -> "Weights":
        """The same for images of `image_size` pixels: positions resampled as timm does (bicubic, antialiased).

        None, or the size that it has, changes nothing. Raises UsageError if the patches do not fill such an image.
        """
        if image_size is None:
            return self
        if image_size <= 0 or image_size % self.shape.patch_size:
            raise UsageError(f"--image-size {image_size} is no multiple of the patch size {self.shape.patch_size}.")
        grid = image_size // self.shape.patch_size
        positions = resample_abs_pos_embed(self.tensors["pos_embed"], [grid, grid], num_prefix_tokens=1)
        shape = replace(self.shape, image_size=image_size)
        return replace(self, shape=shape, tensors={**self.tensors, "pos_embed": positions})

    def check(self) -> "Weights":
        """Itself; DataError unless names and sizes of the tensors are exactly those of its kind and shape."""
        _ = self.mapet() if self.kind == "pretraining" else self.vit()
        return self

    def mapet(self) -> MaPeT:
        """The pre-training model; it shares the tensors' memory. DataError if the kind is another."""
        if self.kind != "pretraining":
            raise DataError(
                f"{self.file} is no pre-training checkpoint: it has no decoder.weight (its kind is {self.kind})."
            )
        return self._filled(lambda: MaPeT(self.shape), self.tensors)

    def vit(self) -> VisionTransformer:
        """timm's ViT with these weights, in eval mode; it has no decoder, and `num_classes` 0 unless a classifier."""
        arguments = self.timm_arguments()
        return self._filled(
            lambda: VisionTransformer(**arguments, num_classes=self.classes, weight_init="skip"), self.timm_tensors()
        ).eval()

    def _filled(self, build: Callable[[], nn.Module], tensors: dict[str, Tensor]) -> Any:
        try:
            with torch.device("meta"):  # initial values would only be thrown away
                model = build()
            model.load_state_dict(tensors, assign=True)
        except RuntimeError as error:
            problem = str(error).splitlines()[:2][-1].strip()  # load_state_dict names the tensor in its second line
            raise DataError(f"{self.file} does not hold the weights of a MaPeT model ({problem[:200]}).") from None
        return model

    def timm_arguments(self) -> dict[str, Any]:
        """What timm's VisionTransformer is built with, besides `num_classes`.

        MaPeT's features are the mean over patches of normed rows; a classifier norms that mean.
        """
        return {
            "img_size": self.shape.image_size,
            "patch_size": self.shape.patch_size,
            "embed_dim": self.shape.dim,
            "depth": self.shape.depth,
            "num_heads": self.shape.heads,
            "mlp_ratio": self.shape.mlp_ratio,
            "init_values": 0.1,  # any number gives a LayerScale, whose gamma is then loaded
            "class_token": True,
            "global_pool": "avg",
            "fc_norm": self.kind == "classifier",
        }

    def timm_tensors(self) -> dict[str, Tensor]:
        """The encoder, and the head if there is one, under timm's names: q and kv are one qkv there."""
        renamed = {}
        for name, tensor in self.tensors.items():
            if ".attn.q." in name:
                # Without kv the qkv is too short, and `check` says so.
                keys_values = self.tensors.get(name.replace(".q.", ".kv."), tensor[:0])
                renamed[name.replace(".q.", ".qkv.")] = torch.cat([tensor, keys_values])
            elif ".attn.kv." not in name and name not in _PRETRAINING_ONLY:
                renamed[name] = tensor
        return renamed

    def timm_config(self) -> dict[str, Any]:
        """The `config.json` that timm opens a folder with (`timm.models._hub.save_config_for_hf` writes the same)."""
        size = (self.shape.dim, self.shape.depth, self.shape.heads)
        name = next((name for name, known in SIZES.items() if known == size), "base")
        side = self.shape.image_size
        return {
            "architecture": f"vit_{name}_patch16_224",  # model_args state the true shape
            "num_classes": self.classes,
            "num_features": self.shape.dim,
            "global_pool": "avg",
            "model_args": self.timm_arguments(),
            "pretrained_cfg": {
                "custom_load": False,
                "input_size": [3, side, side],
                "fixed_input_size": True,
                "crop_pct": 1.0,
                "crop_mode": "center",
                **self.input.to_json(),
                "pool_size": None,
                "first_conv": "patch_embed.proj",
                "classifier": "head",
            },
        }


def published_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's names back to the published ones; the inverse of `Weights.timm_tensors`, bit for bit."""
    renamed = {}
    for name, tensor in tensors.items():
        if ".attn.qkv." in name:
            third = len(tensor) // 3
            renamed[name.replace(".qkv.", ".q.")] = tensor[:third].clone()
            renamed[name.replace(".qkv.", ".kv.")] = tensor[third:].clone()
        else:
            renamed[name] = tensor
    return renamed

"""A ViT's tensors under the published names, with everything that is needed to use them."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from ...shared.errors import DataError, UsageError
from ...shared.images.views import Preprocess
from ...shared.storage.files import sha256_file
from ..model.mapet import MaPeT
from ..model.shape import SIZES, Shape
from .schema import refuse_other_sizes

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

_PRETRAINING_ONLY = ("mask_positional_token", "decoder.weight", "decoder.bias")
_Model = TypeVar("_Model", bound=nn.Module)


@dataclass(frozen=True)
class Input:
    """The preprocessing of a model's training images: (pixel / 255 - mean) / std after resizing by `interpolation`."""

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Red, green, blue; the default is ImageNet's."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    """bicubic or bilinear."""
    crop_pct: float | None = None
    """Of a classifier: the share of the resized image that its evaluation crops; None where nothing says so."""

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Input":
        """Reads `mean`, `std`, `interpolation` and, if it is there, `crop_pct`; ignores other fields.

        Raises:
            KeyError, TypeError or ValueError if one of them is missing or not valid.
        """
        (red, green, blue), (red_std, green_std, blue_std) = (map(float, fields[name]) for name in ("mean", "std"))
        if fields["interpolation"] not in ("bicubic", "bilinear"):
            raise ValueError(f"input {fields}")
        crop = fields.get("crop_pct")
        if crop is not None and not 0 < float(crop) <= 1:
            raise ValueError(f"input {fields}")
        means, deviations = (red, green, blue), (red_std, green_std, blue_std)
        return cls(means, deviations, fields["interpolation"], None if crop is None else float(crop))

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, eq=False)
class Weights:
    """The weights of a Vision Transformer, of one of three kinds.

    - "pretraining": everything that MaPeT trains.
    - "encoder": the same without decoder and mask embedding, which is what an export keeps.
    - "classifier": a fine-tuned ViT, whose `fc_norm` and `head` follow the average over patches.

    Raises DataError unless names and sizes of the tensors are exactly those of the kind and shape.
    """

    file: Path
    """The file that the tensors were read from."""
    shape: Shape
    """`k` is 0 unless the kind is "pretraining"."""
    tensors: dict[str, Tensor]
    """float32 on the CPU, under the names of the published checkpoints."""
    input: Input = field(default_factory=Input)
    seed: int = 0
    """The seed of the run that trained the weights; 0 if it is not known."""
    class_names: tuple[str, ...] | None = None
    """Of a classifier: the name of each output; None where nothing says so."""
    target: str = "tokens"
    """Of the kind "pretraining": what its decoder predicts, tokens or features; of these there are `shape.k`."""

    def __post_init__(self) -> None:
        refuse_other_sizes(self.shape, {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}, self.file)
        for name, tensor in self.tensors.items():
            if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
                raise DataError(f"{self.file} holds numbers that are not finite, in {name[:200]}; use other weights.")
        _ = self.mapet() if self.kind == "pretraining" else self.vit()
        if self.class_names is not None and len(self.class_names) != self.classes:
            raise DataError(f"{self.file} has {self.classes} outputs and {len(self.class_names)} class names.")

    @property
    def kind(self) -> str:
        """ "pretraining", "encoder" or "classifier"."""
        if "head.weight" in self.tensors:
            return "classifier"
        return "pretraining" if "decoder.weight" in self.tensors else "encoder"

    @property
    def classes(self) -> int:
        """The number of classes of the head; 0 without a head."""
        return len(self.tensors["head.weight"]) if self.kind == "classifier" else 0

    @property
    def output_names(self) -> tuple[str, ...]:
        """The class names; numbers from 0 where they are not known."""
        return self.class_names or tuple(map(str, range(self.classes)))

    @property
    def grid(self) -> int:
        """The number of patches along one side of an image."""
        return self.shape.image_size // self.shape.patch_size

    @property
    def preprocess(self) -> Preprocess:
        """Resizes the shorter side to the model's size, then crops the centre."""
        size = self.shape.image_size
        return Preprocess(size, "shortest", size, self.input.interpolation, self.input.mean, self.input.std)

    def sha256(self) -> str:
        """The digest of the file that the tensors were read from."""
        return sha256_file(self.file)

    def resized(self, image_size: int | None) -> "Weights":
        """The same weights for images of another size: positions are resampled as timm does (bicubic, antialiased).

        Args:
            image_size: pixels; None, or the present size, changes nothing.

        Raises:
            UsageError if `image_size` is not a multiple of the patch size.
        """
        if image_size is None:
            return self
        if image_size <= 0 or image_size % self.shape.patch_size:
            raise UsageError(f"--image-size {image_size} is not a multiple of the patch size {self.shape.patch_size}.")
        from timm.layers.pos_embed import resample_abs_pos_embed

        grid = image_size // self.shape.patch_size
        positions = resample_abs_pos_embed(self.tensors["pos_embed"], [grid, grid], num_prefix_tokens=1)
        shape = replace(self.shape, image_size=image_size)
        return replace(self, shape=shape, tensors={**self.tensors, "pos_embed": positions})

    def mapet(self) -> MaPeT:
        """The pre-training model, which shares the tensors' memory.

        Raises:
            DataError if the weights are of another kind.
        """
        if self.kind != "pretraining":
            raise DataError(
                f"{self.file} is not a pre-training checkpoint: it has no decoder.weight (its kind is {self.kind})."
            )
        return self._with_tensors(lambda: MaPeT(self.shape), self.tensors)

    def vit(self) -> "VisionTransformer":
        """timm's ViT with these weights, in eval mode, without a decoder; a classifier's has its head."""
        from timm.models.vision_transformer import VisionTransformer

        arguments = self.timm_arguments()
        model = self._with_tensors(
            lambda: VisionTransformer(**arguments, num_classes=self.classes, weight_init="skip"), self.timm_tensors()
        )
        return model.eval()

    def _with_tensors(self, build: Callable[[], _Model], tensors: dict[str, Tensor]) -> _Model:
        """The model that `build` makes, with these tensors as its parameters."""
        try:
            with torch.device("meta"):  # initial values would only be thrown away
                model = build()
            model.load_state_dict(tensors, assign=True)
        except RuntimeError as error:
            problem = str(error).splitlines()[:2][-1].strip()  # load_state_dict names the tensor in its second line
            raise DataError(f"{self.file} does not hold the weights of a MaPeT model ({problem[:200]}).") from None
        return model

    def timm_arguments(self) -> dict[str, Any]:
        """The arguments of timm's VisionTransformer, except `num_classes`.

        A classifier applies its norm to the mean over patches; the other kinds take the mean of normed patches.
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
        """The encoder, and the head if there is one, under timm's names, which join q and kv as qkv."""
        renamed: dict[str, Tensor] = {}
        for name, tensor in self.tensors.items():
            if ".attn.q." in name:
                # Without kv the qkv is too short, which `load_state_dict` reports.
                keys_values = self.tensors.get(name.replace(".q.", ".kv."), tensor[:0])
                renamed[name.replace(".q.", ".qkv.")] = torch.cat([tensor, keys_values])
            elif ".attn.kv." not in name and name not in _PRETRAINING_ONLY:
                renamed[name] = tensor
        return renamed

    def timm_config(self, model_sha256: str) -> dict[str, Any]:
        """The `config.json` from which timm opens a folder (`timm.models._hub.save_config_for_hf` writes the same).

        `model_sha256`, the digest of the tensors' file, is mapet's own; timm leaves it alone.
        """
        size = (self.shape.dim, self.shape.depth, self.shape.heads)
        name = next((name for name, known in SIZES.items() if known == size), "base")
        side = self.shape.image_size
        return {
            "architecture": f"vit_{name}_patch16_224",  # model_args override its sizes
            "num_classes": self.classes,
            "num_features": self.shape.dim,
            "global_pool": "avg",
            **({} if self.class_names is None else {"label_names": list(self.class_names)}),
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
            "model_sha256": model_sha256,
        }


def published_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with timm's names under the published ones: the inverse of `Weights.timm_tensors`, bit for bit."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if ".attn.qkv." in name:
            third = len(tensor) // 3
            renamed[name.replace(".qkv.", ".q.")] = tensor[:third].clone()
            renamed[name.replace(".qkv.", ".kv.")] = tensor[third:].clone()
        else:
            renamed[name] = tensor
    return renamed

"""VQ-KD, the tokenizer of BEiT v2 (arXiv 2208.06366): a ViT, a small head, and the nearest code at unit length."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ...shared.images.views import Preprocess
from ..towers.tower import OpenedModel

NAME = "vqkd"
_HEAD_WIDTH = 64
_DROPPED = ("loss", "teacher", "scaling", "decoder", "decode_task_layer", "quantize")
_CODES = "quantize.embedding.weight"


class VqkdEncoder(nn.Module):
    """Pixels (B, 3, S, S) in [-1, 1] -> features (B, code length, rows, columns), not yet of unit length."""

    def __init__(self, tensors: dict[str, Tensor]):
        """Takes the tensors of `split`; raises ValueError, KeyError or RuntimeError if they are not such an encoder."""
        from timm.models.vision_transformer import VisionTransformer

        super().__init__()
        dim, _, patch_size, _ = tensors["vit.patch_embed.proj.weight"].shape
        self.side = round((tensors["vit.pos_embed"].shape[1] - 1) ** 0.5)
        self.image_size = self.side * patch_size
        self.vit = VisionTransformer(
            img_size=self.image_size,
            patch_size=patch_size,
            embed_dim=dim,
            depth=1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("vit.blocks.")),
            num_heads=dim // _HEAD_WIDTH,
            mlp_ratio=len(tensors["vit.blocks.0.mlp.fc1.weight"]) / dim,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            global_pool="avg",
            fc_norm=True,
            num_classes=0,
        )
        hidden, length = len(tensors["head.0.weight"]), len(tensors["head.2.weight"])
        self.head = nn.Sequential(nn.Linear(dim, hidden), nn.Tanh(), nn.Linear(hidden, length))
        self.load_state_dict(tensors)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.vit.fc_norm(self.vit.forward_features(pixels)[:, 1:])
        maps: Tensor = self.head(patches).transpose(1, 2).reshape(len(pixels), -1, self.side, self.side)
        return maps


def is_vqkd(tensors: dict[str, Tensor]) -> bool:
    """Whether a published file holds VQ-KD."""
    return _CODES in tensors


def split(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of the encoder under the names of `VqkdEncoder`, and the codes (K, length), of a published file.

    The bias of keys is zero; the file has those of queries and values only.
    """
    encoder: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith(_DROPPED):
            continue
        if name.endswith(".v_bias"):
            continue
        if name.endswith(".q_bias"):
            values = tensors[name.removesuffix("q_bias") + "v_bias"]
            bias = torch.cat([pad(tensor, (0, len(tensor))), values])
            encoder[_renamed(name.removesuffix("q_bias") + "qkv.bias")] = bias
        else:
            encoder[_renamed(name)] = tensor
    return encoder, tensors[_CODES]


def _renamed(name: str) -> str:
    return name.replace("encoder.", "vit.", 1).replace("encode_task_layer.", "head.", 1)


def opened_vqkd(tensors: dict[str, Tensor], image_size: int | None) -> OpenedModel:
    """The encoder as a tower's model; `image_size` must be None or the encoder's own."""
    encoder = VqkdEncoder(tensors)
    size = encoder.image_size
    if image_size not in (None, size):
        raise ValueError(f"images of {image_size} pixels; its own size is {size}")

    def intermediates(pixels: Tensor, layer: int, final_norm: bool) -> Tensor:
        maps: Tensor = encoder(pixels)
        return maps

    half = (0.5, 0.5, 0.5)
    preprocess = Preprocess(size, "shortest", size, "bicubic", half, half)
    return OpenedModel(encoder, intermediates, NAME, preprocess, {"class": "VqkdEncoder", "head_width": _HEAD_WIDTH})

"""DALL-E's discrete VAE (arXiv 2102.12092), the tokenizer of BEiT: a residual CNN, and the largest of K logits."""

from collections import OrderedDict

from torch import Tensor, nn

from ...shared.images.views import Preprocess
from ..towers.tower import OpenedModel

NAME = "dvae"
_IMAGE_SIZE = 112
_OUTPUT = "output.conv."


class _Block(nn.Module):
    """id(x) + gain * res(x)."""

    def __init__(self, width: int, out: int, gain: float):
        super().__init__()
        hidden = out // 4
        self.gain = gain
        self.id_path = nn.Conv2d(width, out, 1) if width != out else nn.Identity()
        layers: list[tuple[str, nn.Module]] = []
        for number, (before, after, size) in enumerate(
            [(width, hidden, 3), (hidden, hidden, 3), (hidden, hidden, 3), (hidden, out, 1)], 1
        ):
            layers += [(f"relu_{number}", nn.ReLU())]
            layers += [(f"conv_{number}", nn.Conv2d(before, after, size, padding=size // 2))]
        self.res_path = nn.Sequential(OrderedDict(layers))

    def forward(self, maps: Tensor) -> Tensor:
        sum_of_paths: Tensor = self.id_path(maps) + self.gain * self.res_path(maps)
        return sum_of_paths


class DvaeEncoder(nn.Module):
    """Pixels (B, 3, S, S) in [0.1, 0.9] -> the maps (B, width, rows, columns) before the last convolution."""

    def __init__(self, tensors: dict[str, Tensor]):
        """Takes the tensors of `split`; raises ValueError, KeyError or RuntimeError if they are not such an encoder."""
        super().__init__()
        names = [name.split(".") for name in tensors if name.startswith("group_")]
        groups = max(int(name[0].removeprefix("group_")) for name in names)
        blocks = max(int(name[1].removeprefix("block_")) for name in names)
        width = len(tensors["input.weight"])
        self.stride = 2 ** (groups - 1)
        self.input = nn.Conv2d(3, width, 7, padding=3)
        for group in range(1, groups + 1):
            layers: list[tuple[str, nn.Module]] = []
            for block in range(1, blocks + 1):
                out = len(tensors[f"group_{group}.block_{block}.res_path.conv_4.weight"])
                layers.append((f"block_{block}", _Block(width, out, 1 / (groups * blocks) ** 2)))
                width = out
            if group < groups:
                layers.append(("pool", nn.MaxPool2d(2)))
            self.add_module(f"group_{group}", nn.Sequential(OrderedDict(layers)))
        self.relu = nn.ReLU()
        self.load_state_dict(tensors)

    def forward(self, pixels: Tensor) -> Tensor:
        maps = pixels
        for layer in self.children():
            maps = layer(maps)
        return maps


def is_dvae(tensors: dict[str, Tensor]) -> bool:
    """Whether a published file holds the encoder of DALL-E's dVAE."""
    return any("blocks.group_1." in name for name in tensors)


def split(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The tensors of the encoder under the names of `DvaeEncoder`, and the last convolution of a published file.

    That convolution is K vectors (K, width) and their bias (K,). The pickled module and the state dict of the FLAVA
    image codebook name the same tensors differently.
    """
    renamed = {}
    for name, tensor in tensors.items():
        short = name.partition("blocks.")[2].replace(".group.", ".").replace(".path.", ".")
        stem, _, last = short.rpartition(".")
        renamed[f"{stem}.{ {'w': 'weight', 'b': 'bias'}.get(last, last) }"] = tensor
    codes, bias = (renamed.pop(_OUTPUT + name) for name in ("weight", "bias"))
    return renamed, codes.flatten(1), bias.flatten()


def opened_dvae(tensors: dict[str, Tensor], image_size: int | None) -> OpenedModel:
    """The encoder as a tower's model, for images of `image_size` pixels (112 unless given).

    It sees the crop of a view resized by Lanczos, as pixels 0.8 x + 0.1.
    """
    encoder, size = DvaeEncoder(tensors), image_size or _IMAGE_SIZE
    if size % encoder.stride:
        raise ValueError(f"images of {size} pixels, which is not a multiple of {encoder.stride}")

    def intermediates(pixels: Tensor, layer: int, final_norm: bool) -> Tensor:
        maps: Tensor = encoder(pixels)
        return maps

    mean, std = (-0.125,) * 3, (1.25,) * 3
    preprocess = Preprocess(size, "shortest", size, "lanczos", (mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))
    return OpenedModel(encoder, intermediates, NAME, preprocess, {"class": "DvaeEncoder", "stride": encoder.stride})

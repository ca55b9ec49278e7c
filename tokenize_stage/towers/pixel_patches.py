"""The tower without a teacher: a patch's features are its own pixels."""

from torch import Tensor, nn
from torch.nn.functional import pixel_unshuffle

from ...shared.errors import UsageError
from ...shared.images.views import Preprocess
from .tower import OpenedModel, TowerSettings

NAME = "pixels"
_PATCH_SIZE, _IMAGE_SIZE = 16, 224
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def open_pixel_tower(settings: TowerSettings) -> OpenedModel:
    """Opens `pixels` (patches of 16 pixels) or `pixels:P` (patches of P pixels).

    A patch's features are its P x P x 3 normalised pixels (mean and std of ImageNet), channel by channel. Raises
    UsageError for options that such a tower does not have, or an image size that is not a multiple of P.
    """
    size, patch = settings.image_size or _IMAGE_SIZE, _patch_size(settings.tower)
    if settings.pretrained is not None:
        raise UsageError(f"--pretrained {settings.pretrained} does not go with --tower pixels, which has no weights.")
    if settings.layer != -1 or settings.final_norm:
        raise UsageError("--layer and --final-norm do not go with --tower pixels, which has no layers.")
    if size % patch:
        raise UsageError(
            f"--image-size {size} is not a multiple of the {patch} pixels of a patch; give another --image-size or "
            f"--tower pixels:P with patches of P pixels."
        )

    def intermediates(pixels: Tensor, layer: int, final_norm: bool) -> Tensor:
        return pixel_unshuffle(pixels, patch)

    return OpenedModel(
        nn.Identity(),
        intermediates,
        "mapet",
        Preprocess(size, "shortest", size, "bicubic", _MEAN, _STD),
        {"class": "PixelPatches", "patch_size": patch},
    )


def _patch_size(name: str) -> int:
    size = name.removeprefix(NAME).removeprefix(":")
    if name == NAME:
        return _PATCH_SIZE
    if not size.isdecimal() or int(size) < 1:
        raise UsageError(f"--tower {name}: {size!r} is not a patch size in pixels; give pixels:P, such as pixels:16.")
    return int(size)

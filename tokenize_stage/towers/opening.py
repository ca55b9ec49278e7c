"""Opens a tower by the name that its library uses."""

from ...shared.errors import UsageError
from .clip_towers import open_clip_tower
from .pixel_patches import NAME as PIXELS
from .pixel_patches import open_pixel_tower
from .timm_towers import open_timm_tower
from .tower import PRECISIONS, OpenedModel, Tower, TowerSettings


def open_tower(settings: TowerSettings, device: str = "cpu") -> Tower:
    """Opens a tower on a device.

    Args:
        settings: `tower` is an open_clip model name, `local-dir:PATH`, `hf-hub:ID`, `timm:NAME`, or `pixels` for the
            pixels themselves; `pretrained` is a tag or a file, or "none" for seeded random weights.
        device: "cpu" or "cuda".

    Raises:
        UsageError: the name, the tag, the layer or the precision is unknown.
        DataError: the weights are missing or cannot be fetched.
    """
    if settings.precision not in PRECISIONS:
        raise UsageError(f"--precision {settings.precision} is unknown; choose from {', '.join(PRECISIONS)}.")
    return Tower(settings, open_model(settings), device)


def open_model(settings: TowerSettings) -> OpenedModel:
    """Opens the model of a tower by the library that its name belongs to. Raises as `open_tower` does."""
    if settings.tower.startswith("timm:"):
        return open_timm_tower(settings)
    if settings.tower.partition(":")[0] == PIXELS:
        return open_pixel_tower(settings)
    return open_clip_tower(settings)

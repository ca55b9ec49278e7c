"""Towers from timm."""

from pathlib import Path
from typing import Any

from torch import Tensor

from ...shared.errors import UsageError
from ...shared.images.views import Preprocess
from .loading import RANDOM, library_errors_explained, seeded_if, unknown_name
from .tower import OpenedModel, TowerSettings


def open_timm_tower(settings: TowerSettings) -> OpenedModel:
    """Opens a timm backbone. Raises UsageError and DataError as `opening.open_tower` does."""
    import timm

    name, random = settings.tower.removeprefix("timm:"), settings.pretrained == RANDOM
    file = settings.pretrained if settings.pretrained and Path(settings.pretrained).is_file() else None
    base = name.partition(".")[0]
    if not timm.is_model(base):
        raise unknown_name("--tower timm:", base, timm.list_models())
    if not random and not file and settings.pretrained:
        tags = [model.partition(".")[2] for model in timm.list_models(f"{base}.*", pretrained=True)]
        if settings.pretrained not in tags:
            raise UsageError(
                f"--pretrained {settings.pretrained} is neither a file nor a tag of timm:{base}; "
                f"its tags are {', '.join(tags) or 'none'}."
            )
        name = f"{base}.{settings.pretrained}"
    with library_errors_explained(settings), seeded_if(random):
        # Any: timm's models have methods that no common base class declares.
        model: Any = timm.create_model(
            name,
            pretrained=not random,
            pretrained_cfg_overlay={"file": file} if file else None,
        )
        # Convolutional backbones take any size; transformers must resample their position embeddings.
        if settings.image_size and hasattr(model, "set_input_size"):
            model.set_input_size(img_size=settings.image_size)
    config = timm.data.resolve_model_data_config(model)  # type: ignore[attr-defined, no-untyped-call]  # not exported

    def intermediates(pixels: Tensor, layer: int, final_norm: bool) -> Tensor:
        maps: list[Tensor] = model.forward_intermediates(
            pixels, indices=[layer], norm=final_norm, intermediates_only=True, stop_early=True, output_fmt="NCHW"
        )
        return maps[0]

    return OpenedModel(model, intermediates, "timm", _timm_preprocess(base, config, settings.image_size))


def _timm_preprocess(name: str, config: dict[str, Any], image_size: int | None) -> Preprocess:
    size = image_size or config["input_size"][1]
    squash = config["crop_mode"] == "squash"
    if not squash and (config["crop_mode"] != "center" or config["crop_pct"] > 1):
        raise UsageError(
            f"--tower timm:{name} sees a padded image (crop_mode {config['crop_mode']!r}, "
            f"crop_pct {config['crop_pct']}), which is not supported; choose another tower."
        )
    return Preprocess(
        image_size=size,
        resize="squash" if squash else "shortest",
        resize_size=size if squash else int(size / config["crop_pct"]),
        interpolation=config["interpolation"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )

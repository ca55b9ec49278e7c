"""segment: measures semantic segmentation with pre-trained weights."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from ..shared.errors import UsageError
from ..shared.report.render import say_page
from ..shared.runtime.devices import choose_device, choose_workers, refuse_many_processes
from ..shared.sources.options import SourceOptions
from ..shared.storage.files import refuse_folder
from ..shared.storage.lock import sole_writer
from .evaluation.embed import PRETRAINED, Execution, fresh_weights
from .masked.data import read_data
from .masked.masks import MaskRule
from .segmentation import page
from .segmentation.frozen import classify_patches, linear_heads
from .segmentation.linear_head import Training
from .segmentation.patches import PatchEncoder
from .segmentation.result import SegmentationResult, show_tables
from .weights.read import load_weights

HEADS = ("linear",)


def segment(
    weights: str | Path,
    images: str | Path | Sequence[str | Path],
    val: str | Path | Sequence[str | Path],
    *,
    classes: str | Path | None = None,
    ignore: Sequence[int] = (255,),
    mask_field: str = "seg.png",
    head: str | None = None,
    random_init: bool = False,
    image_size: int | None = None,
    max_patches: int = 200_000,
    iterations: int = 1_000,
    iteration_batch: int = 16,
    seed: int = 0,
    html: str | Path | None = None,
    key_until: str | None = None,
    key_prefix: str | None = None,
    image_field: str | None = None,
    max_pixels: int | None = None,
    batch_size: int = 32,
    workers: int | None = None,
    device: str = "auto",
) -> list[SegmentationResult]:
    """Measures semantic segmentation with frozen features: logistic regression and k-NN of patches, or a linear head.

    Without `head`, images and masks are squashed to the model's square input (as in CAPI, arXiv 2502.08769). Logistic
    regression predicts the most frequent class of each patch, which all its pixels get; in k-NN each neighbour votes
    with its block of pixels. Hyper-parameters are chosen on a tenth of the training images, and the validation images
    are measured once. The figures are mean intersection over union (IoU) of the classes that occur in the validation
    masks, and the share of the pixels that are right.

    Args:
        weights: A run, a checkpoint, an imported or exported folder, or a published .pth.tar.
        images: Training images: tars with KEY.jpg and KEY.seg.png, or a folder images/ beside a folder annotations/
            of PNG files with the same names, such as ADE20K's images/training.
        val: The same for the validation images.
        classes: File of class names: line i, counted from 0, is the name of class index i.
        ignore: Value of pixels that are neither learned from nor measured; may be given several times, such as 0 and
            255 for ADE20K.
        mask_field: What follows the key in the name of a mask in a tar.
        head: linear: train batch normalisation and a 1x1 convolution on random crops instead, and measure them by
            sliding windows (as in DINOv3, arXiv 2508.10104).
        random_init: Also measure the same model with the initial weights of the run's seed.
        image_size: Pixels; resamples the position embeddings to another grid (default: as it was).
        max_patches: Most patches of the training images that are kept; of more, each image gives the same number, drawn
            by its key.
        iterations: Steps that a linear head is trained for; published are 40,000.
        iteration_batch: Images per step.
        seed: Of a linear head's initial weights and crops.
        html: Page to write: images with their true and predicted classes, and the IoU of each class.
        key_until: Where an image's key ends in its file name, first-dot or last-dot (default: first-dot in tars, as in
            WebDataset, and last-dot in folders).
        key_prefix: none, or tar: keys begin with the name of their tar (of their folder, if several are given).
        image_field: Which picture of a key is its image, by what follows the key in its name, such as jpg or jpg,png.
        max_pixels: Most pixels of an image (default: 178,956,970).
        batch_size: Images per forward pass.
        workers: Processes that decode images (default: none on the CPU, up to 16 on CUDA).
        device: Where the model runs: auto (CUDA if it is there), cpu or cuda.

    Returns:
        One result per classifier for the weights, then those of the random initialisation if asked for.

    Raises:
        DataError if the weights, images or masks cannot be read, an image has no mask or one of another size, a mask is
        no PNG of one channel, holds a class without a name or only ignored pixels; UsageError for options that do not
        fit.
    """
    refuse_many_processes()
    if head is not None and head not in HEADS:
        raise UsageError(f"--head {head} is unknown; choose {' or '.join(HEADS)}.")
    path = None if html is None else Path(html)
    if path is not None:
        refuse_folder(path, "--html", "segmentation.html")
    rule = MaskRule.read(tuple(ignore), classes)
    loaded = load_weights(weights).resized(image_size)
    device_name = choose_device(device)
    execution = Execution(batch_size, choose_workers(workers, device_name), device_name)
    options = SourceOptions(key_until, key_prefix, image_field, max_pixels)
    with nullcontext() if path is None else sole_writer(path, option="--html"):
        data = read_data(images, val, options, mask_field, rule, execution.workers)
        encoders = [PatchEncoder.of(PRETRAINED, loaded, device_name)]
        if random_init:
            encoders.append(PatchEncoder.of("random init", fresh_weights(loaded), device_name))
        shown = {pair.image.key for pair in page.shown_images(data.val)}
        if head is None:
            measured = classify_patches(loaded, encoders, data, max_patches, shown, execution)
        else:
            training = Training(iterations, iteration_batch, seed)
            measured = linear_heads(loaded, encoders, data, training, shown, execution)
        if path is not None:
            page.write(path, Path(weights), measured, data.val, rule)
            say_page(path)
    return [SegmentationResult.of(one, data) for one in measured]


def show(rows: Sequence[SegmentationResult], *, as_json: bool = False) -> None:
    """Prints the figures as two tables, or everything as one JSON object."""
    show_tables(rows, as_json=as_json)

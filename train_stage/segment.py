"""segment: measures semantic segmentation with pre-trained weights, frozen or fine-tuned."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from ..shared.errors import UsageError
from ..shared.report.render import say_page
from ..shared.runtime.console import progress
from ..shared.runtime.devices import choose_device, choose_workers, refuse_many_processes
from ..shared.runtime.distributed import World, joined_world
from ..shared.sources.options import SourceOptions
from ..shared.storage.files import refuse_folder
from ..shared.storage.lock import sole_writer
from .evaluation.embed import PRETRAINED, Execution, fresh_weights
from .masked.data import SegmentationData, read_data
from .masked.masked_images import Source
from .masked.masks import MaskRule
from .runs.loop import dry_run
from .runs.loop import train as train_run
from .runs.opening import open_run
from .runs.resume import find_resume_point
from .segmentation import page
from .segmentation.frozen import classify_patches, linear_heads
from .segmentation.linear_head import Training
from .segmentation.patches import PatchEncoder
from .segmentation.result import SegmentationResult, show_tables
from .segmentation.scores import Measured
from .settings import SegmentSettings, flat, resolve_segmenting
from .tasks.segmenting import SegmentingTask, refuse_other_masks
from .training.dry_run import RunEstimate
from .weights.checkpoint import EMA, MODEL, load_tensors
from .weights.read import load_weights
from .weights.weights import Weights

HEADS = ("linear", "upernet")
MAX_PATCHES, ITERATIONS, ITERATION_BATCH, SEED = 200_000, 1_000, 16, 0


def segment(
    weights: str | Path,
    images: str | Path | Sequence[str | Path],
    val: str | Path | Sequence[str | Path],
    *,
    classes: str | Path | None = None,
    ignore: Sequence[int] = (255,),
    mask_field: str = "seg.png",
    head: str | None = None,
    out: str | Path | None = None,
    recipe: str | Path | None = None,
    overrides: Sequence[str] = (),
    from_scratch: bool = False,
    resume: str = "auto",
    random_init: bool = False,
    image_size: int | None = None,
    max_patches: int = MAX_PATCHES,
    iterations: int = ITERATIONS,
    iteration_batch: int = ITERATION_BATCH,
    seed: int = SEED,
    html: str | Path | None = None,
    key_until: str | None = None,
    key_prefix: str | None = None,
    image_field: str | None = None,
    max_pixels: int | None = None,
    batch_size: int = 32,
    workers: int | None = None,
    device: str = "auto",
) -> list[SegmentationResult]:
    """Measures semantic segmentation: logistic regression and k-NN of frozen patches, a linear head, or UPerNet.

    Without `head`, images and masks are squashed to the model's square input (as in CAPI, arXiv 2502.08769). Logistic
    regression predicts the most frequent class of each patch, which all its pixels get; in k-NN each neighbour votes
    with its block of pixels. Hyper-parameters are chosen on a tenth of the training images, and the validation images
    are measured once. The figures are mean intersection over union (IoU) of the classes that occur in the validation
    masks, and the share of the pixels that are right.

    With `head` upernet, the encoder is fine-tuned together with UPerNet (as in BEiT v2, arXiv 2208.06366) in a run like
    those of pre-training, which resumes bit-identically on the CPU; a finished run is measured again.

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
            sliding windows (as in DINOv3, arXiv 2508.10104). upernet: fine-tune the encoder with UPerNet in a run.
        out: Folder of the run, with `head` upernet: settings.yaml, run.json, metrics.jsonl, checkpoints/.
        recipe: With `head` upernet, the name of a shipped recipe, such as segment-small-data, or a YAML file.
        overrides: With `head` upernet, a setting, such as model.channels=64; repeat for more.
        from_scratch: With `head` upernet, start from fresh weights of the same shape, as a control; the same as
            model.from_scratch.
        resume: With `head` upernet, auto resumes the run in OUT from its newest whole checkpoint, if there is one;
            never refuses to.
        random_init: Also measure the same model, frozen, with the initial weights of the run's seed.
        image_size: Pixels; resamples the position embeddings to another grid (default: as it was). With `head` upernet
            the same as model.image_size.
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
        batch_size: Images per forward pass when features are computed and figures measured.
        workers: Processes that decode images (default: none on the CPU, up to 16 on CUDA).
        device: Where the model runs: auto (CUDA if it is there), cpu or cuda.

    Returns:
        One result per classifier for the weights, then those of the random initialisation if asked for. In a process of
        torchrun other than the first an empty list.

    Raises:
        DataError if the weights, images or masks cannot be read, an image has no mask or one of another size, a mask is
        no PNG of one channel, holds a class without a name or only ignored pixels, or a loss is not finite; UsageError
        for options or settings that do not fit, or that differ from those of the run to resume; Interrupted after
        Ctrl-C or SIGTERM in a run, with a checkpoint written.
    """
    if head is not None and head not in HEADS:
        raise UsageError(f"--head {head} is unknown; choose {' or '.join(HEADS)}.")
    page_path = None if html is None else Path(html)
    if page_path is not None:
        refuse_folder(page_path, "--html", "segmentation.html")
    device_name = choose_device(device)
    execution = Execution(batch_size, choose_workers(workers, device_name), device_name)
    options = SourceOptions(key_until, key_prefix, image_field, max_pixels)
    job = _Job(weights, images, val, options, mask_field, MaskRule.read(tuple(ignore), classes), page_path, execution)
    of_frozen = {
        "--random-init": random_init,
        "--max-patches": max_patches != MAX_PATCHES,
        "--iterations": iterations != ITERATIONS,
        "--iteration-batch": iteration_batch != ITERATION_BATCH,
        "--seed": seed != SEED,
    }
    of_runs = {
        "--out": out is not None,
        "--recipe": recipe is not None,
        "--set": bool(overrides),
        "--from-scratch": from_scratch,
        "--resume": resume != "auto",
    }
    if head != "upernet":
        _refuse(of_runs, "is of --head upernet; add that, or leave it out")
        return _frozen(job, head, image_size, random_init, max_patches, Training(iterations, iteration_batch, seed))
    _refuse(of_frozen, "is of frozen encoders; --head upernet has --from-scratch, and takes its settings by --set")
    if out is None:
        raise UsageError("--head upernet trains a run; give its folder with --out.")
    loaded, settings = _resolve(weights, recipe, overrides, from_scratch, image_size, workers)
    return _fine_tuned(job, Path(out), loaded, settings, resume)


def segment_dry_run(
    weights: str | Path,
    images: str | Path | Sequence[str | Path],
    val: str | Path | Sequence[str | Path],
    *,
    classes: str | Path | None = None,
    ignore: Sequence[int] = (255,),
    mask_field: str = "seg.png",
    head: str | None = None,
    recipe: str | Path | None = None,
    overrides: Sequence[str] = (),
    from_scratch: bool = False,
    image_size: int | None = None,
    key_until: str | None = None,
    key_prefix: str | None = None,
    image_field: str | None = None,
    max_pixels: int | None = None,
    workers: int | None = None,
    device: str = "auto",
) -> RunEstimate:
    """With --head upernet, estimates the steps, FLOPs, memory and time of a run, from ten measured steps. Nothing is
    written.

    Args:
        weights: As for `segment`.
        images: As for `segment`.
        val: As for `segment`.
        classes: As for `segment`.
        ignore: As for `segment`.
        mask_field: As for `segment`.
        head: upernet.
        recipe: As for `segment`.
        overrides: As for `segment`.
        from_scratch: As for `segment`.
        image_size: As for `segment`.
        key_until: As for `segment`.
        key_prefix: As for `segment`.
        image_field: As for `segment`.
        max_pixels: As for `segment`.
        workers: As for `segment`.
        device: Where the model runs: auto (CUDA if it is there), cpu or cuda.

    Raises:
        UsageError for another head, and UsageError and DataError as `segment` does.
    """
    if head != "upernet":
        raise UsageError("--dry-run estimates a run; add --head upernet, or leave it out.")
    options, device = SourceOptions(key_until, key_prefix, image_field, max_pixels), choose_device(device)
    rule, readers = MaskRule.read(tuple(ignore), classes), choose_workers(workers, device)
    loaded, settings = _resolve(weights, recipe, overrides, from_scratch, image_size, workers)
    with joined_world(device, {"weights": weights, "images": images, "val": val, **flat(settings)}) as world:
        task = world.all_or_raise(
            lambda: SegmentingTask(settings, loaded.shape, read_data(images, val, options, mask_field, rule, readers))
        )
        return dry_run(task, world, device)


def _resolve(
    weights: str | Path,
    recipe: str | Path | None,
    overrides: Sequence[str],
    from_scratch: bool,
    image_size: int | None,
    workers: int | None,
) -> tuple[Weights, SegmentSettings]:
    """The weights, and the settings of a run that starts from them."""
    asked = [*overrides, *(["model.from_scratch=true"] if from_scratch else [])]
    asked += [] if image_size is None else [f"model.image_size={image_size}"]
    asked += [] if workers is None else [f"data.workers={workers}"]
    loaded = load_weights(weights)
    return loaded, resolve_segmenting(recipe, asked, loaded.shape.image_size, loaded.input.to_json())


def _refuse(given: Mapping[str, bool], reason: str) -> None:
    for option, there in given.items():
        if there:
            raise UsageError(f"{option} {reason}.")


@dataclass(frozen=True, eq=False)
class _Job:
    """What is measured on which images, and the page that shows it."""

    weights: str | Path
    images: Source
    val: Source
    options: SourceOptions
    mask_field: str
    rule: MaskRule
    html: Path | None
    execution: Execution

    def read(self) -> SegmentationData:
        return read_data(self.images, self.val, self.options, self.mask_field, self.rule, self.execution.workers)

    def page_lock(self) -> AbstractContextManager[None]:
        return nullcontext() if self.html is None else sole_writer(self.html, option="--html")

    def results(self, measured: Sequence[Measured], data: SegmentationData) -> list[SegmentationResult]:
        """The results, and the page of them."""
        if self.html is not None:
            page.write(self.html, Path(self.weights), measured, data.val, self.rule)
            say_page(self.html)
        return [SegmentationResult.of(one, data) for one in measured]


def _frozen(
    job: _Job, head: str | None, image_size: int | None, random_init: bool, max_patches: int, training: Training
) -> list[SegmentationResult]:
    """Classifiers of patches, or a linear head, on frozen encoders."""
    refuse_many_processes()
    loaded, device = load_weights(job.weights).resized(image_size), job.execution.device
    with job.page_lock():
        data = job.read()
        encoders = [PatchEncoder.of(PRETRAINED, loaded, device)]
        if random_init:
            encoders.append(PatchEncoder.of("random init", fresh_weights(loaded), device))
        shown = page.shown_keys(data.val)
        if head is None:
            measured = classify_patches(loaded, encoders, data, max_patches, shown, job.execution)
        else:
            measured = linear_heads(loaded, encoders, data, training, shown, job.execution)
        return job.results(measured, data)


def _fine_tuned(
    job: _Job, out: Path, loaded: Weights, settings: SegmentSettings, resume: str
) -> list[SegmentationResult]:
    """Trains the run in `out` to its end, or finds it finished, and measures its last weights in the first process."""
    device = job.execution.device
    given = {"weights": job.weights, "images": job.images, "val": job.val, "resume": resume, "out": out}
    with joined_world(device, {**given, **flat(settings)}) as world, sole_writer(out, world):
        task = world.all_or_raise(lambda: SegmentingTask(settings, loaded.shape, job.read()))
        world.refuse_differences({"the masks of --images": task.images.masks_sha256})
        with job.page_lock() if world.is_first else nullcontext():
            init = None if settings.model.from_scratch else job.weights
            checkpoint = _trained(task, out, resume, init, device, world)
            if not world.is_first:
                return []
            tensors = load_tensors(checkpoint, MODEL if settings.train.ema is None else EMA)
            with progress("measuring", len(task.data.val)) as advance:
                execution = replace(job.execution, advance=advance)
                measured = task.measure(tensors, page.shown_keys(task.data.val), execution)
            return job.results([measured], task.data)


def _trained(task: SegmentingTask, out: Path, resume: str, init: str | Path | None, device: str, world: World) -> Path:
    """The last checkpoint of the run in `out`, after what is left of its training."""
    point = world.on_rank_zero(
        lambda: find_resume_point(
            out,
            resume,
            task.name,
            task.settings,
            SegmentSettings(),
            lambda before: refuse_other_masks(out, before, task.images),
        )
    )
    run = open_run(task, out, point, init, device, world)
    with run.logbook:
        return train_run(run)


def show(rows: Sequence[SegmentationResult], *, as_json: bool = False) -> None:
    """Prints the figures as two tables, or everything as one JSON object."""
    show_tables(rows, as_json=as_json)

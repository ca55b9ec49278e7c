"""encode-shards: images -> their tokens, in one shard of the token store per shard of the source."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from upath import UPath

from ..shared.errors import UsageError
from ..shared.images.on_error import skips
from ..shared.images.views import ViewPolicy
from ..shared.runtime.console import say, table
from ..shared.runtime.devices import choose_workers
from ..shared.runtime.distributed import World, joined_world
from ..shared.sources.keys import KeyLedger
from ..shared.sources.options import SourceOptions
from ..shared.sources.sources import SourceShard, open_source, with_labels
from ..shared.storage.lock import sole_writer
from ..shared.storage.remote import as_path, exists
from ..shared.tokens.store import SUFFIXES, TokenStore, stored_entries
from .encoding.dry_run import EncodingEstimate, estimate_encoding, nothing_left
from .encoding.shards import Encoder
from .encoding.unfinished import survey_keys, unfinished_shards
from .encoding.writing import begin_store, finish_store, write_shards
from .tokenizers.opening import SavedTokenizer, read_tokenizer


def encode_shards(
    images: str | Path | Sequence[str | Path],
    codebook: str | Path,
    out: str | Path,
    *,
    crop: str = "center",
    views: int = 1,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (0.75, 1.3333333333333333),
    flip: float = 0.5,
    with_center: bool = False,
    seed: int = 0,
    format: str = "zarr",
    on_error: str = "stop",
    labels: str | Path | None = None,
    label_field: str | None = None,
    key_until: str | None = None,
    key_prefix: str | None = None,
    image_field: str | None = None,
    label_from: str | None = None,
    max_pixels: int | None = None,
    tower: str | None = None,
    batch_size: int = 64,
    workers: int | None = None,
    device: str = "auto",
    compile: bool = False,
) -> TokenStore:
    """Writes every image's visual tokens to shards; again, to add images or views.

    Whole shards in `out` are kept. Under torchrun the source's shards are distributed over the processes; the store
    has the same bytes with any number of processes.

    Args:
        images: Tars, folders of tars, or folders of class folders; patterns like train-{000..015}.tar, globs and URLs
            included.
        codebook: Folder that build-codebook wrote.
        out: Folder or URL of the token store; whole shards in it are skipped.
        crop: center (the tower's own preprocessing) or random-resized.
        views: Views stored of each image; more can be added later.
        scale: Of random-resized, the share of the image's area, from lowest to highest.
        ratio: Of random-resized, the ratio of width to height, from lowest to highest.
        flip: Of random-resized, the probability of a mirrored view.
        with_center: View 0 is the centre view.
        seed: Seed of the random views.
        format: zarr (tokens only), or webdataset (tars of images and their tokens).
        on_error: At an unreadable image, stop, or skip it (it is counted and listed); an image with an unreadable label
            is kept without one.
        labels: File of labels: a number or name a line in the sorted order of the images, or a CSV or JSON lines with a
            key column.
        label_field: Field of the tars' JSON members that holds the label; of a file of labels, its label column.
        key_until: Where an image's key ends in its file name, first-dot or last-dot (default: first-dot in tars, as in
            WebDataset, and last-dot in folders).
        key_prefix: none, or tar: keys begin with the name of their tar (of their folder, if several are given).
        image_field: Which picture of a key is its image, by what follows the key in its name, such as jpg or jpg,png.
        label_from: auto, or tar: the class of a tar's images is the name of the tar.
        max_pixels: Most pixels of an image (default: 178,956,970).
        tower: Where the codebook's tower is now, if it moved.
        batch_size: Views per forward pass.
        workers: Processes that decode images (default: 0 on the CPU, up to 16 on CUDA).
        device: auto, cpu or cuda.
        compile: Compile the tower with torch.compile, on GPUs and for long runs: the first batch takes a minute more.
            Tokens differ where two centroids are equally near up to rounding.

    Returns:
        The token store, opened.

    Raises:
        FingerprintMismatch: `out` was begun with another codebook or other views, or the tower is not the codebook's.
        DataError: An image cannot be read, or a source changed since it was encoded.
        UsageError: An option is invalid, or differs from that of the store in `out`.
    """
    given = dict(locals())
    options = _Options(
        policy=ViewPolicy(crop, views, scale, ratio, flip, with_center, seed),
        format=_known_format(format),
        skip=skips(on_error),
        labels=labels,
        label_field=label_field,
        source=SourceOptions(key_until, key_prefix, image_field, max_pixels, label_from),
        tower=tower,
        batch_size=batch_size,
        workers=workers,
        device=device,
        compile=compile,
    )
    path = as_path(out)
    with joined_world(given=given) as world, sole_writer(path, world):
        work = _plan_work(images, codebook, path, options, world)
        if work.unfinished:
            encoder = _open_encoder(work, options, world)
            world.on_rank_zero(lambda: begin_store(work.out, encoder))
            write_shards(work.out, encoder, world.shard(work.unfinished), work.ledger, format)
            world.wait()
        listed_anew = as_path(out)  # other processes may have written to a remote folder
        world.on_rank_zero(lambda: finish_store(listed_anew, work.shards, work.ledger, changed=bool(work.unfinished)))
        store = TokenStore(listed_anew)
        if world.is_first:
            _summary(store, len(work.unfinished))
        return store


def encode_shards_dry_run(
    images: str | Path | Sequence[str | Path],
    codebook: str | Path,
    out: str | Path,
    *,
    crop: str = "center",
    views: int = 1,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (0.75, 1.3333333333333333),
    flip: float = 0.5,
    with_center: bool = False,
    seed: int = 0,
    format: str = "zarr",
    on_error: str = "stop",
    labels: str | Path | None = None,
    label_field: str | None = None,
    key_until: str | None = None,
    key_prefix: str | None = None,
    image_field: str | None = None,
    label_from: str | None = None,
    max_pixels: int | None = None,
    tower: str | None = None,
    batch_size: int = 64,
    workers: int | None = None,
    device: str = "auto",
    compile: bool = False,
) -> EncodingEstimate:
    """Estimates hours, bytes and rows from a few measured batches; writes nothing.

    It takes the options of `encode_shards` and estimates the same call of it.

    Args:
        images: Tars, folders of tars, or folders of class folders; patterns like train-{000..015}.tar, globs and URLs
            included.
        codebook: Folder that build-codebook wrote.
        out: Folder or URL of the token store; whole shards in it are not counted.
        crop: center (the tower's own preprocessing) or random-resized.
        views: Views stored of each image; more can be added later.
        scale: Of random-resized, the share of the image's area, from lowest to highest.
        ratio: Of random-resized, the ratio of width to height, from lowest to highest.
        flip: Of random-resized, the probability of a mirrored view.
        with_center: View 0 is the centre view.
        seed: Seed of the random views.
        format: zarr (tokens only), or webdataset (tars of images and their tokens).
        on_error: At an unreadable image, stop, or skip it (it is counted and listed); an image with an unreadable label
            is kept without one.
        labels: File of labels: a number or name a line in the sorted order of the images, or a CSV or JSON lines with a
            key column.
        label_field: Field of the tars' JSON members that holds the label; of a file of labels, its label column.
        key_until: Where an image's key ends in its file name, first-dot or last-dot (default: first-dot in tars, as in
            WebDataset, and last-dot in folders).
        key_prefix: none, or tar: keys begin with the name of their tar (of their folder, if several are given).
        image_field: Which picture of a key is its image, by what follows the key in its name, such as jpg or jpg,png.
        label_from: auto, or tar: the class of a tar's images is the name of the tar.
        max_pixels: Most pixels of an image (default: 178,956,970).
        tower: Where the codebook's tower is now, if it moved.
        batch_size: Views per forward pass.
        workers: Processes that decode images (default: 0 on the CPU, up to 16 on CUDA).
        device: auto, cpu or cuda.
        compile: Compile the tower with torch.compile, on GPUs and for long runs: the first batch takes a minute more.
            Tokens differ where two centroids are equally near up to rounding.

    Returns:
        The estimate; its numbers of shards, images, seconds and bytes are zero where nothing is left to do.

    Raises:
        FingerprintMismatch: `out` was begun with another codebook or other views, or the tower is not the codebook's.
        DataError: An image cannot be read, or a source changed since it was encoded.
        UsageError: An option is invalid, or differs from that of the store in `out`.
    """
    given = dict(locals())
    options = _Options(
        policy=ViewPolicy(crop, views, scale, ratio, flip, with_center, seed),
        format=_known_format(format),
        skip=skips(on_error),
        labels=labels,
        label_field=label_field,
        source=SourceOptions(key_until, key_prefix, image_field, max_pixels, label_from),
        tower=tower,
        batch_size=batch_size,
        workers=workers,
        device=device,
        compile=compile,
    )
    path = as_path(out)
    with joined_world(given=given) as world:
        work = _plan_work(images, codebook, path, options, world)
        if not work.unfinished:
            return nothing_left(str(out), views, world.size)
        encoder = _open_encoder(work, options, world)
        return world.on_rank_zero(
            lambda: estimate_encoding(encoder, str(out), work.unfinished, work.ledger, world.size, format)
        )


def show_estimate(estimate: EncodingEstimate) -> None:
    """Prints what `encode_shards_dry_run` returned as a table."""
    if not estimate.shards:
        say(f"{estimate.store} holds all of it already; nothing is left to do.")
        return
    if estimate.uncounted_shards:
        say("Remote shards were not opened; they are assumed to hold as many images as the others.")
    rate, views = estimate.images_per_second, estimate.views
    duration = timedelta(seconds=round(estimate.seconds))
    table(
        "Dry run: nothing was written",
        [
            ("measured", f"{estimate.batches} batches, {rate:,.1f} images/s ({rate * views:,.1f} views/s) per process"),
            ("rows", f"{estimate.images:,} images x {views} views in {estimate.shards} shards"),
            ("time", f"{duration} (h:mm:ss) with {estimate.processes} process(es) of that speed"),
            ("bytes", f"{estimate.bytes:,} ({estimate.bytes_per_image:,.0f} per image)"),
        ],
    )


@dataclass(frozen=True)
class _Options:
    """The validated options of both functions."""

    policy: ViewPolicy
    format: str
    skip: bool
    labels: str | Path | None
    label_field: str | None
    source: SourceOptions
    tower: str | None
    batch_size: int
    workers: int | None
    device: str
    compile: bool


@dataclass(frozen=True)
class _Work:
    """The source, and those of its shards that the store `out` still lacks."""

    out: Path | UPath
    shards: list[SourceShard]
    unfinished: list[SourceShard]
    ledger: KeyLedger
    tokenizer: SavedTokenizer


def _known_format(format: str) -> str:
    if format not in SUFFIXES:
        raise UsageError(f"--format {format} is unknown; choose {' or '.join(SUFFIXES)}.")
    return format


def _plan_work(
    images: str | Path | Sequence[str | Path],
    codebook: str | Path,
    out: Path | UPath,
    options: _Options,
    world: World,
) -> _Work:
    """Compares the source with the store, and reads the headers of the source's shards."""
    source = world.on_rank_zero(lambda: _source_options(out, options.source))
    shards, saved = world.all_or_raise(
        lambda: (
            with_labels(open_source(images, source, skip=options.skip), options.labels, options.label_field),
            read_tokenizer(codebook),
        )
    )
    world.refuse_differences(
        {"the fingerprint of --codebook": saved.fingerprint, "the shards of IMAGES": [shard.name for shard in shards]}
    )
    indices = world.on_rank_zero(
        lambda: unfinished_shards(out, shards, saved.fingerprint, codebook, options.policy, options.format)
    )
    if len(indices) < len(shards):
        say(f"{len(shards) - len(indices)} of {len(shards)} shards are whole already.")
    ledger = survey_keys(shards, world, options.skip)
    return _Work(out, shards, [shards[index] for index in indices], ledger, saved)


def _source_options(out: Path | UPath, given: SourceOptions) -> SourceOptions:
    """Those of the store that `out` has been begun with, if it holds any shard, with what was given anew."""
    entries = stored_entries(out) if exists(out / "codebook.json") else {}
    if not entries:
        return given
    return SourceOptions.of_store(entry["source"] for entry in entries.values()).given(given, str(out))


def _open_encoder(work: _Work, options: _Options, world: World) -> Encoder:
    tokenizer = world.all_or_raise(
        lambda: work.tokenizer.open(tower=options.tower, device=options.device, compile=options.compile)
    )
    workers = choose_workers(options.workers, tokenizer.device.type)
    return Encoder(tokenizer, options.policy, options.skip, options.batch_size, workers)


def _summary(store: TokenStore, encoded: int) -> None:
    written = sum(entry["bytes"] for entry in store.entries.values())
    skipped = store.skipped()
    rows = [
        ("images", f"{len(store):,} in {len(store.entries)} shards ({encoded} encoded now)"),
        ("views", f"{store.views} per image ({store.view['crop']})"),
        ("tokens", f"{store.grid[0]}x{store.grid[1]} per view, K={store.k}"),
        ("codebook", store.fingerprint),
        ("size", f"{written:,} bytes, {store.storage} ({written / max(len(store) * store.views, 1):.0f} per view)"),
        ("written to", str(store.path)),
    ]
    if skipped:
        name, key, reason = skipped[0]
        rows.append(("skipped", f"{len(skipped)}, the first in {name}: {key or '(no key)'}: {reason}"))
    unlabelled = store.unlabelled()
    if unlabelled:
        name, _, reason = unlabelled[0]
        rows.append(("without a label", f"{len(unlabelled):,} image(s) are kept, the first in {name}: it {reason}"))
    table("Token store", rows)

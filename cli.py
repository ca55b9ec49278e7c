"""The command line: each command is a few lines that call one public function. No logic here."""

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from .shared.errors import MapetError
from .shared.runtime.distributed import is_first_process

app = typer.Typer(
    name="mapet",
    help="Tokenizer-first pre-training of Vision Transformers: k-CLIP tokens once, then MaPeT.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
tokenize = typer.Typer(help="Stage 1: images -> codebook -> token shards.", no_args_is_help=True)
train = typer.Typer(help="Stage 2: images and tokens -> a pre-trained ViT.", no_args_is_help=True)
app.add_typer(tokenize, name="tokenize")
app.add_typer(train, name="train")

Images = Annotated[
    str, typer.Argument(help="A tar, a folder of class folders, or tars like train-{000..015}.tar, URLs included.")
]
Workers = Annotated[
    int | None, typer.Option(help="Processes that decode images (default: 0 on the CPU, up to 16 on CUDA).")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
BatchSize = Annotated[int, typer.Option(help="Images per forward pass.", min=1)]
OnError = Annotated[str, typer.Option(help="At what cannot be read: stop, or skip (it is counted and listed).")]
Weights = Annotated[
    Path, typer.Argument(help="A run, a checkpoint, an imported or exported folder, or a published .pth.tar.")
]
GridSize = Annotated[
    int | None, typer.Option("--image-size", help="Pixels; resamples position embeddings (default: as it was).", min=1)
]
Tower = Annotated[str, typer.Option(help="open_clip name, local-dir:PATH, hf-hub:ID or timm:NAME.")]
Pretrained = Annotated[
    str | None,
    typer.Option(help="Tag or local file; 'none' for random weights (default: openai, or timm's own)."),
]
Layer = Annotated[int, typer.Option(help="Index into forward_intermediates, negative from the end.")]
FinalNorm = Annotated[bool, typer.Option(help="Take ViT features after the final norm.")]
TowerSize = Annotated[int | None, typer.Option(help="Pixels (default: the tower's own).", min=8)]
Precision = Annotated[str, typer.Option(help="Of the tower: float32 or bfloat16.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of a table.")]


@tokenize.command()
def build_codebook(
    images: Images,
    out: Annotated[Path, typer.Option(help="Folder to write the codebook to.")],
    tower: Tower = "RN50x64",
    pretrained: Pretrained = None,
    layer: Layer = -1,
    final_norm: FinalNorm = False,
    image_size: TowerSize = None,
    precision: Precision = "float32",
    k: Annotated[int, typer.Option("--k", help="Number of centroids.")] = 8192,
    patches: Annotated[
        int | None, typer.Option(help="Patch features to sample (default: 512 a centroid, or all).", min=1)
    ] = None,
    iterations: Annotated[int, typer.Option(help="Of k-means.")] = 20,
    restarts: Annotated[int, typer.Option(help="Of k-means; the best one is kept.")] = 5,
    metric: Annotated[str, typer.Option(help="l2, or cosine (unit features, spherical k-means).")] = "l2",
    seed: Annotated[int, typer.Option(help="Of the sample and of k-means.")] = 0,
    init: Annotated[str, typer.Option(help="First centroids: random, or k-means++.")] = "random",
    max_images: Annotated[int | None, typer.Option(help="Use a seeded subset of this many images.", min=1)] = None,
    on_error: OnError = "stop",
    features_cache: Annotated[
        Path | None, typer.Option(help="Folder that keeps the sampled features, for another K.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="For the sample and k-means, such as 8GB (default: 3/4 of what is free).")
    ] = None,
    batch_size: BatchSize = 64,
    workers: Workers = None,
    device: Device = "auto",
) -> None:
    """Train a k-means codebook over the patch features of a frozen CLIP tower."""
    from .tokenize_stage.build_codebook import build_codebook

    build_codebook(
        images,
        out,
        tower=tower,
        pretrained=pretrained,
        layer=layer,
        final_norm=final_norm,
        image_size=image_size,
        precision=precision,
        k=k,
        patches=patches,
        iterations=iterations,
        restarts=restarts,
        metric=metric,
        seed=seed,
        init=init,
        max_images=max_images,
        on_error=on_error,
        features_cache=features_cache,
        memory=memory,
        batch_size=batch_size,
        workers=workers,
        device=device,
    )


@tokenize.command()
def encode_shards(
    images: Images,
    codebook: Annotated[str, typer.Option(help="Folder that build-codebook wrote.")],
    out: Annotated[str, typer.Option(help="Folder or URL of the token store; whole shards in it are skipped.")],
    crop: Annotated[str, typer.Option(help="center (the tower's own preprocessing) or random-resized.")] = "center",
    views: Annotated[int, typer.Option(help="Views stored of each image; more can be added later.")] = 1,
    scale: Annotated[tuple[float, float], typer.Option(help="Of random-resized: share of the area.")] = (0.2, 1.0),
    ratio: Annotated[tuple[float, float], typer.Option(help="Of random-resized: width to height.")] = (0.75, 4 / 3),
    flip: Annotated[float, typer.Option(help="Of random-resized: probability of a mirrored view.")] = 0.5,
    with_center: Annotated[bool, typer.Option("--with-center", help="View 0 is the centre view.")] = False,
    seed: Annotated[int, typer.Option(help="Of the views.")] = 0,
    format: Annotated[
        str, typer.Option(help="zarr (tokens only), or webdataset (tars of images and their tokens).")
    ] = "zarr",
    on_error: OnError = "stop",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say hours, bytes and rows; write nothing.")] = False,
    tower: Annotated[str | None, typer.Option(help="Where the codebook's tower is now, if it moved.")] = None,
    batch_size: Annotated[int, typer.Option(help="Views per forward pass.", min=1)] = 64,
    workers: Workers = None,
    device: Device = "auto",
) -> None:
    """Write every image's visual tokens to shards; again, to add images or views."""
    from .tokenize_stage.encode_shards import encode_shards, encode_shards_dry_run, show_estimate

    outcome = (encode_shards_dry_run if dry_run else encode_shards)(
        images,
        codebook,
        out,
        crop=crop,
        views=views,
        scale=scale,
        ratio=ratio,
        flip=flip,
        with_center=with_center,
        seed=seed,
        format=format,
        on_error=on_error,
        tower=tower,
        batch_size=batch_size,
        workers=workers,
        device=device,
    )
    if dry_run:
        show_estimate(outcome)


@tokenize.command()
def inspect(
    path: Annotated[str, typer.Argument(help="A codebook or a token store, local or a URL.")],
    key: Annotated[str | None, typer.Option(help="Show the token grid of this image.")] = None,
    against: Annotated[str | None, typer.Option(help="Say what changed from this codebook or store to PATH.")] = None,
    json: AsJson = False,
    html: Annotated[Path | None, typer.Option(help="Also write a page to look at: one file, no network.")] = None,
    images: Annotated[
        str | None, typer.Option(help="Pictures for the page (not needed if the store holds them).")
    ] = None,
    codebook: Annotated[
        str | None, typer.Option(help="Of the page: show the patches nearest each centroid; runs the tower.")
    ] = None,
    tower: Annotated[str | None, typer.Option(help="Where the codebook's tower is now, if it moved.")] = None,
    seed: Annotated[int, typer.Option(help="Of the images and patches that the page shows.")] = 0,
    device: Device = "auto",
) -> None:
    """Show what made a codebook or a token store, how its codes are used, and what is suspicious about it."""
    from .tokenize_stage.inspect import inspect, show

    about = inspect(
        path,
        key=key,
        against=against,
        html=html,
        images=images,
        codebook=codebook,
        tower=tower,
        seed=seed,
        device=device,
    )
    show(about, as_json=json)


@tokenize.command()
def verify(
    tokens: Annotated[str, typer.Argument(help="A token store or a codebook, local or a URL.")],
    codebook: Annotated[str | None, typer.Option(help="Also check that it was made with this codebook.")] = None,
    images: Annotated[str | None, typer.Option(help="Also check the source, every image's bytes included.")] = None,
    reencode: Annotated[
        int, typer.Option(help="Also encode this many random images again; needs --images and --codebook.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Of the images that are encoded again.")] = 0,
    tower: Annotated[str | None, typer.Option(help="Where the codebook's tower is now, if it moved.")] = None,
    batch_size: Annotated[int, typer.Option(help="Views per forward pass.", min=1)] = 64,
    workers: Workers = None,
    device: Device = "auto",
) -> None:
    """Check that every shard is present, whole, checksummed and made with the codebook it names."""
    from .tokenize_stage.verify import verify

    verify(
        tokens,
        codebook=codebook,
        images=images,
        reencode=reencode,
        seed=seed,
        tower=tower,
        batch_size=batch_size,
        workers=workers,
        device=device,
    )


@tokenize.command("import")
def import_tokens(
    out: Annotated[Path, typer.Option(help="Folder to write: a codebook, or a token store.")],
    centroids: Annotated[Path | None, typer.Option(help=".npy of floats (K, dim): makes a codebook.")] = None,
    tower: Tower = "RN50x64",
    pretrained: Pretrained = None,
    layer: Layer = -1,
    final_norm: FinalNorm = False,
    image_size: TowerSize = None,
    precision: Precision = "float32",
    metric: Annotated[str, typer.Option(help="Of the centroids: l2, or cosine (of length one).")] = "l2",
    device: Device = "auto",
    tokens: Annotated[Path | None, typer.Option(help=".npy of integers (n, H*W) or (n, H, W): makes a store.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Whose row i names the image of row i of --tokens.")] = None,
    images: Annotated[str | None, typer.Option(help="The images of --tokens: tars or a folder.")] = None,
    codebook: Annotated[Path | None, typer.Option(help="The codebook of --tokens.")] = None,
) -> None:
    """Take centroids (--centroids) or tokens (--tokens --csv --images --codebook) that were computed elsewhere."""
    from .tokenize_stage.import_tokens import import_codebook, import_tokens, which_import

    parts = {"tokens": tokens, "csv": csv, "images": images, "codebook": codebook}
    if which_import(centroids=centroids, **parts) == "tokens":
        import_tokens(out, **parts)
        return
    import_codebook(
        out,
        centroids=centroids,
        tower=tower,
        pretrained=pretrained,
        layer=layer,
        final_norm=final_norm,
        image_size=image_size,
        precision=precision,
        metric=metric,
        device=device,
    )


@train.command()
def pretrain(
    tokens: Annotated[str, typer.Option(help="The token store of these images, local or a URL.")],
    out: Annotated[Path, typer.Option(help="Folder of the run.")],
    images: Annotated[
        str | None,
        typer.Option(help="A tar, a folder of class folders, or a pattern of tars (not needed if TOKENS holds them)."),
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="A shipped recipe's name, or a YAML file.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="A setting, such as optimizer.lr=1e-3; repeat for more.")
    ] = None,
    objective: Annotated[str | None, typer.Option(help="mapet, pim or mim (default: the recipe's).")] = None,
    init: Annotated[
        str | None, typer.Option(help="Start a new run from a run, checkpoint, import, export or .pth.tar.")
    ] = None,
    resume: Annotated[str, typer.Option(help="auto: go on with the run in --out, if there is one; never.")] = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say steps, FLOPs, memory and hours; write nothing.")
    ] = False,
    device: Device = "auto",
) -> None:
    """Pre-train MaPeT on images and their precomputed tokens."""
    from .train_stage.pretrain import pretrain

    pretrain(
        images,
        tokens,
        out,
        recipe=recipe,
        overrides=overrides or (),
        objective=objective,
        init=init,
        resume=resume,
        dry_run=dry_run,
        device=device,
    )


@train.command()
def probe(
    weights: Weights,
    images: Annotated[str, typer.Option(help="Labelled training images.")],
    val: Annotated[str, typer.Option(help="Labelled validation images.")],
    random_init: Annotated[bool, typer.Option(help="Also probe the model with fresh weights.")] = False,
    pixels: Annotated[bool, typer.Option(help="Also probe the raw pixels.")] = False,
    batch_size: BatchSize = 128,
    workers: Workers = None,
    device: Device = "auto",
) -> None:
    """Measure frozen features with a linear probe and k-NN."""
    from .train_stage.probe import probe

    probe(
        weights,
        images,
        val,
        random_init=random_init,
        pixels=pixels,
        batch_size=batch_size,
        workers=workers,
        device=device,
    )


@train.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders that pretrain wrote; several are shown side by side.")],
    html: Annotated[
        Path | None, typer.Option(help="The page to write (default: report.html in the first one).")
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Tokens of held-out images, to show what the runs predict for them.")
    ] = None,
    images: Annotated[str | None, typer.Option(help="These images (not needed if TOKENS holds them).")] = None,
    seed: Annotated[int, typer.Option(help="Of the images and patches that are predicted.")] = 0,
    device: Device = "auto",
) -> None:
    """Write runs as a page to look at: curves, probes, settings, and what they predict."""
    from .train_stage.report import report

    report(runs, html=html, images=images, tokens=tokens, seed=seed, device=device)


@train.command()
def features(
    images: Annotated[str, typer.Argument(help="A tar, a folder of class folders, or a pattern of tars.")],
    weights: Annotated[Path, typer.Option(help="What probe takes: a run, an import, an export, a .pth.tar ...")],
    out: Annotated[Path, typer.Option(help="Zarr group to write, such as features.zarr.")],
    patches: Annotated[bool, typer.Option(help="Write each patch's features too, H x W times as much.")] = True,
    image_size: GridSize = None,
    batch_size: BatchSize = 128,
    workers: Workers = None,
    device: Device = "auto",
) -> None:
    """Write frozen features: keys, one vector an image, one a patch, labels, and what made them."""
    from .train_stage.features import features

    features(
        images,
        weights,
        out,
        patches=patches,
        image_size=image_size,
        batch_size=batch_size,
        workers=workers,
        device=device,
    )


@train.command()
def export(
    weights: Weights,
    out: Annotated[Path, typer.Option(help="Folder to write: model.safetensors and config.json.")],
    image_size: GridSize = None,
) -> None:
    """Write a folder that timm.create_model("local-dir:OUT", pretrained=True) opens."""
    from .train_stage.export import export

    export(weights, out, image_size=image_size)


@train.command("import")
def import_weights(
    file: Annotated[Path, typer.Argument(help="A published .pth.tar; or a run, a checkpoint, an exported folder.")],
    out: Annotated[Path, typer.Option(help="Folder to write: model.safetensors and weights.json.")],
    image_size: GridSize = None,
) -> None:
    """Read weights from elsewhere, running nothing in them, into one plain folder that every command takes."""
    from .train_stage.import_weights import import_weights

    import_weights(file, out, image_size=image_size)


@app.command()
def demo(
    images: Annotated[str | None, typer.Option(help="Your own pictures instead of the drawn ones.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for everything that the demo writes.")] = Path("mapet-demo"),
    seed: Annotated[int, typer.Option(help="Of pictures, codebook and training.")] = 0,
) -> None:
    """Run the whole chain in a few minutes, offline, on what the package carries."""
    from .quickstart.demo import demo

    demo(images, out=out, seed=seed)


@app.command()
def doctor(json: AsJson = False) -> None:
    """Print versions, devices, the FAISS build and what is missing, fit for a bug report."""
    from .shared.doctor import doctor, show

    show(doctor(), as_json=json)


def main() -> None:
    """The `mapet` command: expected failures end with one sentence and their exit code, never with a traceback."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app()
    except MapetError as error:
        _fail(str(error), error.exit_code)
    except OSError as error:
        _fail(f"{error.filename or 'a file'}: {error.strerror or error}.", 1)
    except SystemExit as end:
        if end.code == 130 and is_first_process():
            _fail("stopped. What was finished is kept; give the same command to go on.", 130)
        raise


def _fail(sentence: str, code: int) -> None:
    # What remains is Python's own end, in which a second Ctrl-C or torchrun's SIGTERM would print a traceback.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    print(f"mapet: {sentence}", file=sys.stderr)
    sys.exit(code)

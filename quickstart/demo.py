"""The whole chain in a few minutes, offline."""

import io
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import webdataset
from PIL import Image

from ..shared.errors import DataError, UsageError
from ..shared.images.decode import read_image
from ..shared.randomness import generator
from ..shared.runtime.console import say, table
from ..shared.sources.records import ImageRecord
from ..shared.sources.sources import read_records
from ..shared.storage.files import written_whole
from ..shared.storage.lock import writes_to_out
from ..tokenize_stage.build_codebook import build_codebook
from ..tokenize_stage.encode_shards import encode_shards
from ..tokenize_stage.inspect import inspect, show
from ..tokenize_stage.pages.token_maps import draw_token_maps
from ..tokenize_stage.verify import verify
from ..train_stage.finetune import finetune
from ..train_stage.pretrain import pretrain
from ..train_stage.probe import probe
from ..train_stage.probe import show as show_probe
from ..train_stage.probing.result import ProbeResult
from ..train_stage.report import report
from .drawings import CLASSES, write_drawings

TOWER = Path(__file__).parent / "tower"
TRAIN_IMAGES, VAL_IMAGES, _PER_TAR = 2000, 1000, 1000
_SEED_OF_VAL = 500
SERIES_OF_TOWER, SERIES_OF_WEIGHTS = 1000, 3000
"""Seeds of the drawings that the tower and the weights of the package were trained on."""
_OWN_VAL_SHARE, _OWN_TAR = 0.2, "images-000000.tar"
K = 128

MODEL_SETTINGS = {
    "model.name": "null",
    "model.dim": 128,
    "model.depth": 4,
    "model.heads": 4,
    "model.image_size": 64,
    "model.patch_size": 8,
    "model.drop_path": 0,
    "optimizer.lr": 1.5e-3,
    "optimizer.betas": "[0.9,0.98]",
    "optimizer.warmup_epochs": 0.5,
    "data.color_jitter": 0,
    "train.batch_size": 8,
    "train.log_every": 50,
}
_EPOCHS_OF_DRAWINGS, _EPOCHS_OF_OWN = 2, 4
TRAINED = "mapet-drawings-tiny"
"""Weights in the package, of the model above after many more epochs of other drawings."""

_FINETUNE_PASSES, _FINETUNE_EPOCHS, _FINETUNE_BATCH = 4000, 4, 32
_FINETUNE_SETTINGS = {
    # The same for both starts, and the same rate in every layer, which does not favour pre-trained ones.
    "optimizer.lr": 1e-3,
    "optimizer.layer_decay": 1,
    "optimizer.warmup_epochs": 0.5,
    "model.drop_path": 0,
    "augment.crop_scale": "[0.5,1]",
    "augment.rand_augment": "null",
    "augment.erasing": 0,
    "augment.mixup": 0,
    "augment.cutmix": 0,
    "validation.every": 1 << 30,
    "train.log_every": 50,
}
"""Validation images are looked at once, at the end."""

_ON_IMAGENET = """
The same on ImageNet with OpenAI's CLIP, as in the paper:
  mapet tokenize build-codebook 'imagenet-train-{{000000..001281}}.tar' --out codebook
  mapet tokenize encode-shards  'imagenet-train-{{000000..001281}}.tar' --codebook codebook --out tokens
  mapet train pretrain --images 'imagenet-train-{{000000..001281}}.tar' --tokens tokens --out run --recipe vit-base-16
Your own pictures, with this small tower: mapet demo --images FOLDER
Everything is in {out}/; the picture of the tokens is {picture}. To look at, in any browser:
  {tokens}: images, their tokens, what codes stand for
  {run}: how training went, what is predicted"""


@writes_to_out
def demo(images: str | Path | None = None, *, out: str | Path = "mapet-demo", seed: int = 0) -> list[ProbeResult]:
    """Makes a codebook and tokens, pre-trains and probes, with the CLIP tower in the package and images drawn by it.

    Args:
        images: Your own images, instead of the drawn ones: a folder of class folders, a folder, or tars.
        out: Folder for all output; a second run resumes where the first one stopped.
        seed: Seed of the drawn images, the codebook and the training.

    Returns:
        One result for each of pre-trained, random init and pixels; an empty list if the images have no labels.

    Raises:
        DataError: The images cannot be read, or are fewer than 20.
        UsageError: `out` holds a demo of other images or another seed, or `seed` draws pictures on which the models in
            the package were trained.
    """
    if images is None and {seed, seed + _SEED_OF_VAL} & {SERIES_OF_TOWER, SERIES_OF_WEIGHTS}:
        raise UsageError(f"--seed {seed} draws pictures on which the package's models were trained; choose another.")
    out = Path(out)
    began = time.monotonic()
    _claim(out, f"{Path(images).absolute() if images else 'drawings'}, seed {seed}")
    with _chapter("1. Images"):
        train, val, labelled = _own_pictures(images, out, seed) if images else _drawn_pictures(out, seed)
    with _chapter(f"2. Codebook: k-means over patch features of the small CLIP tower in {TOWER.name}/"):
        codebook = build_codebook(
            str(train), out / "codebook", tower=f"local-dir:{TOWER}", k=K, restarts=1, seed=seed, patches=100_000
        )
    with _chapter("3. Tokens of every image, once and for all"):
        store = encode_shards(str(train), out / "codebook", out / "tokens")
        verify(out / "tokens", codebook=out / "codebook", images=str(train))
        show(inspect(out / "tokens", html=out / "tokens.html", images=str(train), codebook=out / "codebook"))
    with _chapter("4. Pre-training: predict the tokens of hidden patches, in random order"):
        settings = {
            **MODEL_SETTINGS,
            "train.epochs": _EPOCHS_OF_OWN if images else _EPOCHS_OF_DRAWINGS,
            "train.seed": seed,
        }
        overrides = [f"{key}={value}" for key, value in settings.items()]
        pretrain(str(train), out / "tokens", out / "run", overrides=overrides)
    weights = out / "run" if images else TRAINED
    results: list[ProbeResult] = []
    if labelled:
        with _chapter("5. Proof: are the frozen features any good?"):
            if not images:
                say(
                    f"{_EPOCHS_OF_DRAWINGS} epochs teach little. From here on the weights are {TRAINED}, which are in "
                    "the package: the same model, pre-trained longer on more drawings, none of them from this demo."
                )
            results = probe(weights, str(train), str(val), random_init=True, pixels=True)
            show_probe(results)
        with _chapter("6. The claim: does pre-training make a better classifier?"):
            _show_claim(results, _finetuned(weights, out, train, val, seed))
    else:
        say("Your pictures have no labels (class folders, or .cls members), so there is nothing to probe.")
    with _chapter("What the model predicts for pictures that it was not trained on"):
        encode_shards(str(val), out / "codebook", out / "val-tokens")
        report(out / "run", html=out / "run.html", tokens=str(out / "val-tokens"), images=str(val))
    records = read_records(str(train))
    picture = draw_token_maps(records[:12], store, codebook, out / "tokens.png")
    for line in _ON_IMAGENET.splitlines():
        say(line.format(out=out, picture=picture, tokens=out / "tokens.html", run=out / "run.html"))
    say(f"Done in {time.monotonic() - began:.0f} s.")
    return results


def _finetuned(weights: str | Path, out: Path, train: Path, val: Path, seed: int) -> list[tuple[str, str]]:
    """(name, accuracy in words) of a classifier fine-tuned from `weights`, and of one that starts from fresh weights.

    Both see the first tar of the training images as often as each other, with the same settings and seed.
    """
    first = min(train.glob("*.tar"))
    labels, measured = ([record.label for record in read_records(str(path))] for path in (first, val))
    unseen = set(measured) - set(labels)
    if unseen:
        say(f"{len(unseen)} of your classes are in no picture to train on, so no classifier is trained.")
        return []
    epochs = min(_FINETUNE_EPOCHS, max(1, _FINETUNE_PASSES // len(labels)))
    settings = {**_FINETUNE_SETTINGS, "train.seed": seed, "train.epochs": epochs}
    settings["train.batch_size"] = min(_FINETUNE_BATCH, len(labels))
    overrides = [f"{key}={value}" for key, value in settings.items()]
    say(
        f"Two classifiers of the same size learn from {len(labels)} labelled pictures in {epochs} epoch(s), with the "
        f"same settings and seed {seed}; one starts from the pre-trained weights, one from fresh ones. Both are "
        f"measured once, on {len(measured)} other pictures."
    )
    rows = []
    for name, folder, from_scratch in (("fine-tuned", "finetuned", False), ("from scratch", "scratch", True)):
        finetune(weights, str(first), str(val), out / folder, overrides=overrides, from_scratch=from_scratch)
        top1 = json.loads((out / folder / "probe.jsonl").read_text().splitlines()[-1])["top1"]
        rows.append((f"classifier, {name}", f"top-1 {top1:.1%}"))
    return rows


def _show_claim(results: list[ProbeResult], classifiers: list[tuple[str, str]]) -> None:
    frozen = [
        (f"frozen features, {result.features}", f"linear probe {result.linear:.1%}, k-NN {result.knn:.1%}")
        for result in results
    ]
    table("What was measured, with one seed", [*frozen, *classifiers])


def _claim(out: Path, source: str) -> None:
    """Reserves the folder for one set of images and one seed, so that files of another demo are not reused."""
    note = out / "source.txt"
    if note.exists() and note.read_text() != source:
        raise UsageError(f"--out {out} holds a demo of {note.read_text()}; choose another --out or delete it.")
    with written_whole(note) as partial:
        partial.write_text(source)


@contextmanager
def _chapter(title: str) -> Iterator[None]:
    say("")
    say(title)
    began = time.monotonic()
    yield
    say(f"   {time.monotonic() - began:.0f} s")


def _drawn_pictures(out: Path, seed: int) -> tuple[Path, Path, bool]:
    say(
        f"Pictures drawn by this package ({len(CLASSES)} kinds: {', '.join(CLASSES)}), and a small CLIP model "
        "trained on captions of such pictures. Nothing is downloaded; this shows that the chain works, not what a "
        "tokenizer trained on photographs would do."
    )
    train, val = out / "images" / "train", out / "images" / "val"
    for folder, count, series in ((train, TRAIN_IMAGES, seed), (val, VAL_IMAGES, seed + _SEED_OF_VAL)):
        draw_tars(folder, count, series)
    say(f"{TRAIN_IMAGES} pictures to train on in {train}, {VAL_IMAGES} to validate on in {val}.")
    return train, val, True


def draw_tars(folder: Path, count: int, series: int) -> None:
    """Writes drawings as `folder`/NAME-000000.tar and so on, NAME its name, unless all of these tars are there."""
    if len(list(folder.glob("*.tar"))) < count // _PER_TAR:
        write_drawings(folder, count, seed=series, per_tar=_PER_TAR, prefix=folder.name)


def _own_pictures(images: str | Path, out: Path, seed: int) -> tuple[Path, Path, bool]:
    """Copies at most as many images as the demo draws into tars, and keeps a fifth of them for validation."""
    records = read_records(images)
    if len(records) < 20:
        raise DataError(f"{images} holds {len(records)} images; the demo needs at least 20.")
    shuffled = sorted(records, key=lambda record: generator(seed, "demo", record.key).random())
    subset = shuffled[: TRAIN_IMAGES + VAL_IMAGES]
    split = int(len(subset) * _OWN_VAL_SHARE)
    train, val = out / "images" / "train", out / "images" / "val"
    for folder, part in ((train, subset[split:]), (val, subset[:split])):
        if not (folder / _OWN_TAR).exists():
            copy_images(part, folder / _OWN_TAR)
    say(f"{len(subset) - split} of your {len(records)} pictures to train on, {split} to validate on.")
    return train, val, all(record.label is not None for record in subset)


def copy_images(records: list[ImageRecord], path: Path) -> None:
    """Writes a tar of images and their labels. Raises DataError, with its name, for a file that is not an image."""
    with written_whole(path) as partial, webdataset.TarWriter(str(partial), mtime=0) as tar:
        for record in records:
            _, data = read_image(record)
            extension = str(Image.open(io.BytesIO(data)).format).lower().replace("jpeg", "jpg")
            sample = {"__key__": record.key, extension: data}
            tar.write(sample if record.label is None else {**sample, "cls": str(record.label).encode()})

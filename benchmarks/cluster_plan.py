"""A plan of a cluster: hours, bytes and dollars to tokenize a data set and to pre-train on it, as Markdown tables.

python benchmarks/cluster_plan.py [--gpus 8 --gpus 64 --gpus 512] [--rate 1441] [--price 3.00] [...]

Nothing is measured here: rates come from the options, whose defaults are those of docs/scale.md, and everything else is
computed from the shape of the model and of the tokens. Formulas (n images, V stored views, G GPUs):

tokenizing    seconds = n / (G x min(tower rate / V, cores x decoding rate)) / efficiency
              tower rate = share of the peak x peak FLOP/s / FLOPs of the tower for a view
k-means       seconds = 2 x sample x K x dimensions x iterations x restarts / FLOP/s of one GPU
pre-training  seconds = steps x max(images of a GPU / min(rate, cores x decoding rate), all-reduce) / efficiency
              all-reduce = 2 x 4 bytes x parameters / bandwidth of a GPU's network; images of a GPU = batch / G
dollars       GPU hours x price
bytes         store: n x (V x (patches x bits of a token / 8 + 33) + 100), index: n x (V x (patches x 2 + 33) + 100),
              sample: sample x dimensions x 2, a checkpoint: 4 x 4 x parameters (weights, two moments, moving average)
"""

import math
from dataclasses import dataclass
from typing import Annotated

import typer
from mapet.train_stage.settings import resolve
from mapet.train_stage.tasks.pretraining import parameters_of

DATA_SETS = {"ImageNet-22k": (14_200_000, 150), "LAION-400M": (400_000_000, 5)}
"""Images, and epochs of pre-training: on ImageNet-22k those of BEiT, on LAION-400M as many images in all."""
TOKEN_BYTES = 2
CROP_BYTES, OTHER_BYTES = 33, 100
"""A view's crop and flip; an image's key, label, size, offset, length and digest. The store compresses them further."""
PATCHES_PER_CENTROID, ITERATIONS, RESTARTS = 512, 20, 5
"""The defaults of build-codebook."""


@dataclass(frozen=True)
class Cluster:
    """What a cluster does, and costs."""

    rate: float
    tower_gflops: float
    tower_share: float
    peak: float
    decoding: float
    cores: int
    network: float
    efficiency: float
    largest_batch: int
    gpu_batch: int
    kmeans_tflops: float
    price: float

    @property
    def loading(self) -> float:
        """Images that the cores beside one GPU decode a second."""
        return self.cores * self.decoding

    def tokenizing(self, images: int, views: int, gpus: int) -> float:
        """Seconds."""
        tower = self.tower_share * self.peak * 1e3 / self.tower_gflops
        return images / (gpus * min(tower / views, self.loading)) / self.efficiency

    def kmeans(self, k: int, dim: int) -> float:
        """Seconds on one GPU."""
        products = 2 * PATCHES_PER_CENTROID * k * k * dim * ITERATIONS * RESTARTS
        return products / (self.kmeans_tflops * 1e12)

    def batch(self, gpus: int) -> int:
        """Images of a global batch."""
        return min(gpus * self.gpu_batch, self.largest_batch)

    def pretraining(self, images: int, epochs: int, gpus: int, parameters: int) -> float:
        """Seconds."""
        batch = self.batch(gpus)
        computing = batch / gpus / min(self.rate, self.loading)
        reducing = 2 * 4 * parameters / (self.network * 1e9) if gpus > 1 else 0.0
        return epochs * (images // batch) * max(computing, reducing) / self.efficiency

    def dollars(self, seconds: float, gpus: int) -> float:
        return seconds / 3600 * gpus * self.price


def store_bytes(images: int, views: int, patches: int, k: int) -> float:
    """Of a token store."""
    return images * (views * (patches * math.ceil(math.log2(k)) / 8 + CROP_BYTES) + OTHER_BYTES)


def index_bytes(images: int, views: int, patches: int) -> float:
    """Of the index in the temporary folder of each node, which holds tokens as they are."""
    return images * (views * (patches * TOKEN_BYTES + CROP_BYTES) + OTHER_BYTES)


def as_bytes(count: float) -> str:
    unit = next(unit for unit in (1e12, 1e9, 1e6) if count >= unit or unit == 1e6)
    return f"{count / unit:,.1f} {({1e12: 'TB', 1e9: 'GB', 1e6: 'MB'})[unit]}"


def as_hours(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:,.1f}" if hours >= 1 else f"{hours:.2g}"


def as_dollars(amount: float) -> str:
    return f"{amount:,.0f}"


def as_table(heading: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(heading) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heading, rule, *rows))


def main(
    gpus: Annotated[list[int], typer.Option(help="Numbers of GPUs.")] = [8, 64, 512],  # noqa: B006
    recipe: str = "vit-base-16",
    rate: Annotated[float, typer.Option(help="Images a second of pre-training on one GPU.")] = 1441,
    views: Annotated[int, typer.Option(help="Stored views of an image.")] = 4,
    k: Annotated[int, typer.Option(help="Codes.")] = 8192,
    dim: Annotated[int, typer.Option(help="Dimensions of the tower's features.")] = 768,
    tower_gflops: Annotated[float, typer.Option(help="10^9 FLOPs of the tower for a view.")] = 35.1,
    tower_share: Annotated[float, typer.Option(help="Share of the peak that the tower reaches.")] = 0.35,
    peak: Annotated[float, typer.Option(help="Peak of one GPU, 10^12 FLOP/s.")] = 989,
    decoding: Annotated[float, typer.Option(help="Images a second that one core decodes and crops.")] = 200,
    cores: Annotated[int, typer.Option(help="Cores beside each GPU.")] = 16,
    network: Annotated[float, typer.Option(help="10^9 bytes a second between one GPU and the others.")] = 25,
    efficiency: Annotated[float, typer.Option(help="Share of the time that is not lost.")] = 0.9,
    gpu_batch: Annotated[int, typer.Option(help="Images of a GPU in a step.")] = 256,
    largest_batch: Annotated[int, typer.Option(help="Images of the largest global batch.")] = 16_384,
    kmeans_tflops: Annotated[float, typer.Option(help="10^12 FLOP/s of k-means on one GPU.")] = 20,
    price: Annotated[float, typer.Option(help="Dollars an hour of one GPU.")] = 3.0,
) -> None:
    cluster = Cluster(
        rate=rate,
        tower_gflops=tower_gflops,
        tower_share=tower_share,
        peak=peak,
        decoding=decoding,
        cores=cores,
        network=network,
        efficiency=efficiency,
        largest_batch=largest_batch,
        gpu_batch=gpu_batch,
        kmeans_tflops=kmeans_tflops,
        price=price,
    )
    shape = resolve(recipe).model.shape(k)
    parameters = parameters_of(shape)
    print(times(cluster, gpus, views, parameters))
    print()
    print(sizes(views, shape.patches, k))
    print()
    print(
        f"In each case k-means takes {cluster.kmeans(k, dim) / 60:,.0f} minutes on one GPU and "
        f"{as_bytes(PATCHES_PER_CENTROID * k * dim * 2)} for its sample of features, and a checkpoint "
        f"{as_bytes(16 * parameters)} ({parameters / 1e6:,.0f} M parameters)."
    )


def times(cluster: Cluster, gpus: list[int], views: int, parameters: int) -> str:
    heading = ["data set, GPUs", "batch", "tokenizing, hours", "dollars", "pre-training, hours", "dollars"]
    rows = []
    for name, (images, epochs) in DATA_SETS.items():
        for count in gpus:
            tokenizing = cluster.tokenizing(images, views, count)
            pretraining = cluster.pretraining(images, epochs, count, parameters)
            cells = [f"{name}, {count}", f"{cluster.batch(count):,}"]
            for seconds in (tokenizing, pretraining):
                cells += [as_hours(seconds), as_dollars(cluster.dollars(seconds, count))]
            rows.append(cells)
    return as_table(heading, rows)


def sizes(views: int, patches: int, k: int) -> str:
    heading = ["data set", "images", "epochs", f"store, {views} views", "index on each node"]
    rows = [
        [
            name,
            f"{images / 1e6:,.1f} M",
            str(epochs),
            as_bytes(store_bytes(images, views, patches, k)),
            as_bytes(index_bytes(images, views, patches)),
        ]
        for name, (images, epochs) in DATA_SETS.items()
    ]
    return as_table(heading, rows)


if __name__ == "__main__":
    typer.run(main)

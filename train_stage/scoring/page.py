"""The page of an evaluation: figures, reliability, confusions, classes, and the most confident mistakes."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from ...shared.images.decode import read_image
from ...shared.images.views import Preprocess, center_view
from ...shared.report.pictures import data_uri
from ...shared.report.render import write_page
from ...shared.sources.records import ImageRecord
from .measures import Scores

MOST_IN_MATRIX, MOST_CONFUSIONS, MOST_MISTAKES = 100, 50, 24
"""Most classes of a confusion matrix that is drawn, and most confusions and pictures of mistakes that are listed."""
_PICTURE_SIDE = 192


def write_classifier_page(
    path: Path,
    weights: str,
    evaluation: dict[str, Any],
    scores: Scores,
    records: Sequence[ImageRecord],
    preprocess: Preprocess,
) -> None:
    """Writes one self-contained HTML file.

    Args:
        path: the page.
        weights: what the page calls the weights.
        evaluation: `EvaluationResult.to_json`.
        scores: what the logits of `records` achieve.
        records: the images, in the order of `scores`.
        preprocess: the view of an image that the classifier was given.

    Raises:
        DataError if an image cannot be read any more, or the page cannot be written.
    """
    matrix = None
    if len(scores.names) <= MOST_IN_MATRIX:
        matrix = {"names": list(scores.names), "counts": scores.matrix().tolist()}
    confusions = scores.confusions()
    data = {
        "evaluation": evaluation,
        "classes": [asdict(entry) for entry in scores.by_class()],
        "bins": [asdict(bin) for bin in scores.bins()],
        "confusions": [asdict(confusion) for confusion in confusions[:MOST_CONFUSIONS]],
        "all_confusions": len(confusions),
        "mistakes": _mistakes(scores, records, preprocess),
        "all_mistakes": int((~scores.right).sum()),
        "matrix": matrix,
    }
    write_page(path, "classifier", title=f"{weights}: mapet classifier", data=data, weights=weights)


def _mistakes(scores: Scores, records: Sequence[ImageRecord], preprocess: Preprocess) -> list[dict[str, Any]]:
    """The wrong predictions with the highest confidence, with their pictures."""
    wrong = (~scores.right).nonzero()[:, 0]
    order = scores.confidence[wrong].argsort(descending=True, stable=True)[:MOST_MISTAKES]
    return [
        {
            "key": records[at].key,
            "picture": _picture(records[at], preprocess),
            "name": scores.names[int(scores.targets[at])],
            "predicted": scores.names[int(scores.predicted[at])],
            "confidence": float(scores.confidence[at]),
        }
        for at in wrong[order].tolist()
    ]


def _picture(record: ImageRecord, preprocess: Preprocess) -> str:
    view = center_view(read_image(record)[0], preprocess)
    return data_uri(view.resize((_PICTURE_SIDE, _PICTURE_SIDE), Image.Resampling.BICUBIC))

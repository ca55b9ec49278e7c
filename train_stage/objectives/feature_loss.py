"""The head and the regression of features: the control that predicts what a tower computes instead of its tokens."""

from torch import Tensor, autocast
from torch.nn import Linear
from torch.nn.functional import cosine_similarity


def feature_loss(rows: Tensor, head: Linear, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mean negative cosine similarity between a linear head and features, plus 1, so that 0 is a perfect prediction.

    This is the objective of EVA (arXiv 2211.07636, section 2.1), which regresses CLIP's features of masked patches.

    Args:
        rows: (..., dim) float, the head's input.
        head: Linear(dim -> D).
        targets: (..., D) float, the true features; their lengths do not matter.

    Returns:
        The loss, a float32 scalar from 0 to 2, and the cosine similarity of each row, (...) float32 without gradient.
    """
    predicted = head(rows)
    with autocast(rows.device.type, enabled=False):
        cosine = cosine_similarity(predicted.float(), targets.float(), dim=-1)
    return 1 - cosine.mean(), cosine.detach()

"""Known faults of a store, and the arithmetic that finds which of them explains its tokens."""

import numpy as np

# Rounding changes about 1 % of tokens at most (bfloat16); whatever fault explains must explain nearly all the rest.
_EXPLAINED, _ROUNDED = 0.8, 0.02


def arrangements(tokens: np.ndarray, before: np.ndarray, after: np.ndarray, flips: np.ndarray) -> dict[str, np.ndarray]:
    """The tokens (n, V, H, W) as stored, and what they should be if they have one of the `FAULTS`.

    `before` and `after` are the stored tokens of the rows before and after, `flips` (n, V) bool.
    """
    mirrored = tokens[..., ::-1]
    # If an image has the tokens of the next one, its own are those stored with the image before.
    found = {"as-stored": tokens, "next": before, "previous": after, "mirrored": mirrored}
    if flips.any() and not flips.all():
        found["flips-ignored"] = np.where(flips[:, :, None, None], mirrored, tokens)
    if tokens.shape[2] == tokens.shape[3]:
        found["transposed"] = tokens.swapaxes(2, 3)
    return found


def fault_of(
    right: np.ndarray, stored: np.ndarray, before: np.ndarray, after: np.ndarray, flips: np.ndarray
) -> tuple[str, dict[str, float]] | None:
    """Which of the `FAULTS` explains that `stored` (n, V, H, W) is not `right`, if one does, and all shares of equals.

    The arguments are those of `arrangements`, for images whose tokens differ.
    """
    if not len(stored):
        return None
    found = arrangements(stored, before, after, flips)
    shares = {sign: float((tokens == right).mean()) for sign, tokens in found.items()}
    sign = max(shares, key=lambda sign: shares[sign])
    if sign == "as-stored" or shares[sign] - shares["as-stored"] < _EXPLAINED * (1 - shares["as-stored"]):
        return None
    return sign, shares

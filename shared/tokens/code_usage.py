"""How evenly the codes of a codebook are used."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def usage(counts: NDArray[Any]) -> dict[str, float | int]:
    """How evenly codes are used, from the count of each code, (K,).

    Returns the number of codes, of used and dead ones, the entropy in bits and the perplexity (2 ** entropy).
    """
    probabilities = counts[counts > 0] / max(counts.sum(), 1)
    entropy = float(-(probabilities * np.log2(probabilities)).sum()) if len(probabilities) else 0.0
    return {
        "codes": len(counts),
        "used": len(probabilities),
        "dead": len(counts) - len(probabilities),
        "entropy_bits": abs(entropy),
        "perplexity": 2.0 ** abs(entropy),
    }

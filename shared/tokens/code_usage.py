"""How evenly the codes of a codebook are used."""

import numpy as np


def usage(counts: np.ndarray) -> dict[str, float | int]:
    """How evenly codes are used: used and dead codes, entropy in bits, perplexity (2 ** entropy), of counts (K,)."""
    share = counts[counts > 0] / max(counts.sum(), 1)
    entropy = float(-(share * np.log2(share)).sum()) if len(share) else 0.0
    return {
        "codes": len(counts),
        "used": len(share),
        "dead": len(counts) - len(share),
        "entropy_bits": abs(entropy),
        "perplexity": 2.0 ** abs(entropy),
    }

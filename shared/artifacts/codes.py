"""How many codes a tokenizer may have, and the type that tokens are stored in."""

from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

MAX_K = 1 << 31
"""The largest K."""
MAX_K_OF_UINT16 = 1 << 16
"""The largest K whose tokens are stored as uint16."""
Codes = Annotated[int, Meta(ge=1, le=MAX_K)]
Dtype = Literal["uint16", "uint32"]
UINT16: Dtype = "uint16"
"""The type of tokens in an artifact that states none."""
Tokens = NDArray[np.unsignedinteger[Any]]
"""An array of tokens, of the `token_dtype` of their tokenizer."""


def token_dtype(k: int) -> Dtype:
    """The type of tokens below K: uint16 up to K = 65,536, and uint32 beyond."""
    return UINT16 if k <= MAX_K_OF_UINT16 else "uint32"

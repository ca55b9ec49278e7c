"""Imports published tokenizers, VQ-KD and DALL-E's dVAE, into a codebook folder."""

from pathlib import Path

from ...shared.runtime.console import say, table
from ...shared.runtime.devices import choose_device
from ...shared.storage.files import refuse_existing, sha256_file, written_whole
from ...shared.tokens.codebook import Codebook
from ..tokenizers.published import ENCODER, read_published


def import_published(file: Path, out: Path, kind: str, image_size: int | None, device: str) -> Codebook:
    """Writes the tokenizer in `file` to the folder `out`; see `import_tokens.import_tokenizer`."""
    if (out / ENCODER).exists() and file.is_file():
        request = Codebook.load(out).description["request"]
        source = request["imported"]
        if (request["tower"], request["image_size"], source["sha256"]) == (kind, image_size, sha256_file(file)):
            say(f"{out} already holds this tokenizer; nothing to do.")
            return Codebook.load(out)
    refuse_existing(out)
    published = read_published(file, kind, image_size, choose_device(device))
    codebook = published.codebook
    with written_whole(out) as partial:
        codebook.save(partial)
        (partial / ENCODER).write_bytes(published.encoder)
    size = codebook.description["preprocess"]["image_size"]
    table(
        "Tokenizer, imported",
        [
            ("kind", f"{kind}, {size} px, from {file.name}"),
            ("codes", f"{codebook.k:,} of {codebook.centroids.shape[1]:,} dimensions"),
            ("grid", f"{codebook.grid[0]}x{codebook.grid[1]}"),
            ("fingerprint", codebook.fingerprint),
            ("written to", str(out)),
        ],
    )
    return codebook

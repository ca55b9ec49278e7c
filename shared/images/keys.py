"""What a file's name says: whether it is an image, and its key."""

EXTENSIONS = ("jpg", "jpeg", "png", "webp")
# Pictures that we do not read; where they stand alone, they must not be passed over in silence.
OTHER_PICTURES = ("avif", "bmp", "gif", "heic", "jp2", "jpe", "jxl", "tif", "tiff")
Skipped = list[tuple[str, str]]
"""(key, reason) of what was left out; the key is "" where a part of a tar has none."""


def key_of(name: str) -> str:
    """WebDataset's `__key__`: the path and the base name up to its first dot."""
    directory, _, base = name.rpartition("/")
    stem = base.partition(".")[0]
    return f"{directory}/{stem}" if directory else stem


def extension_of(name: str) -> str:
    """What follows the last dot of a file's name, in lower case."""
    return name.rpartition(".")[2].lower()


def plain(text: str) -> str:
    """`text` with what is not UTF-8 spelled out, so that it can be written and hashed."""
    return text.encode("utf-8", "backslashreplace").decode()


def unfit_name(name: str) -> str | None:
    """Why a name cannot be a key, or None."""
    if name.startswith("/") or ".." in name.split("/"):
        return f"holds {name!r}, a name that leaves its folder; rename it"
    if any("\ud800" <= character <= "\udfff" for character in name):
        return f"holds {name!r}, and that name is not UTF-8; rename it"
    return None

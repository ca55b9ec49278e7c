"""Makes and opens wrong artifacts: `python fuzzing.py ARTIFACTS WORK COUNT KIND ...` prints a JSON line for each.

See test_fuzz_artifacts.
"""

import contextlib
import copy
import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tarfile
import time
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import mapet
import numpy as np
from mapet.shared.errors import MapetError
from mapet.shared.storage.files import SEAL, canonical_json, sha256_file
from mapet.train_stage.settings import resolve
from numcodecs.zstd import compress

HANG = 100
"""Seconds after which a trial hangs, whatever else the machine does; the processor's seconds are measured as well."""
MORE_MEMORY = 16 << 30  # of addresses; what is really taken is measured
INTS = [-1, 0, 1, 2, 7, 65_536, 2**31, 2**40, 2**62, 2**63, 10**30, -(2**63)]
FLOATS = [0.0, -1.0, 1e308, -1e308, 1e-300, 0.5]
TEXTS = [
    "",
    "../outside/bait",
    "/etc/passwd",
    "/dev/zero",
    "x" * 70_000,
    "\x1b[31m",
    "${oc.env:HOME}",
    "é",
    "a/b",
    "0" * 64,
]
ODD: list[Any] = [None, True, [], {}, [[]], {"a": 1}]
BENT = {
    "codebook": "codebook",
    "centroids": "codebook",
    "manifest": "tokens",
    "entry": "tokens",
    "zarr": "tokens",
    "tar": "tars",
    "state": "run",
    "tensors": "run",
    "yaml": "run",
    "log": "run",
    "weights": "weights",
    "export": "export",
}
"""The artifact that a trial of a kind changes, in a copy of its own."""
Draw = random.Random


def places(value: Any, at: tuple = ()) -> list[tuple]:
    """The path of every value inside a JSON value."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, child in children for place in ((*at, key), *places(child, (*at, key)))]


def mutated(content: Any, draw: Draw) -> tuple[Any, str]:
    """A copy with one value changed according to its type, and what was done."""
    content = copy.deepcopy(content)
    *above, key = draw.choice(places(content))
    parent = content
    for step in above:
        parent = parent[step]
    old, how = parent[key], draw.randrange(8)
    where = ".".join(map(str, (*above, key)))
    if how == 0:
        del parent[key]
        return content, f"{where} missing"
    if how == 1 and isinstance(parent, list):
        parent.append(old)
    elif how == 2:
        parent[key] = draw.choice(ODD)
    elif how == 3:
        parent[key] = [old]
    elif isinstance(old, bool) or old is None or isinstance(old, dict | list):
        parent[key] = draw.choice([*INTS, *TEXTS])
    elif isinstance(old, int):
        parent[key] = draw.choice([*INTS, old + 1, -old, float(old), str(old)])
    elif isinstance(old, float):
        parent[key] = draw.choice([*FLOATS, *INTS, str(old)])
    else:
        parent[key] = draw.choice([*TEXTS, old[:-1], old + "x", 5])
    return content, f"{where}: {str(parent[key] if not isinstance(parent, list) or key < len(parent) else '')[:60]!r}"


def seal(path: Path, content: dict) -> None:
    """Writes sealed JSON, whatever is in it."""
    content = {name: value for name, value in content.items() if name != SEAL}
    digest = hashlib.sha256(canonical_json(content).encode()).hexdigest()
    text = json.dumps({**content, SEAL: digest}, indent=1, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def load(path: Path) -> dict:
    content = json.loads(path.read_text())
    content.pop(SEAL, None)
    return content


def bent_json(path: Path, draw: Draw) -> str:
    """Mutates a sealed JSON file and seals it again; once in a while it is nested deeply."""
    if draw.random() < 0.03:
        content = load(path)
        name = draw.choice(sorted(set(content) - {"format", "version"}))
        deep: Any = 1
        for _ in range(draw.choice([40, 400])):
            deep = [deep]
        content[name] = deep
        seal(path, content)
        return f"{name} nested"
    content, done = mutated(load(path), draw)
    seal(path, content)
    return done


def linked(path: Path, outside: Path, draw: Draw) -> str:
    """Replaces a file by a link that leads out of its artifact, or by a pipe."""
    copied = outside / path.name
    shutil.copy(path, copied)
    path.unlink()
    target = draw.choice(["/dev/zero", "/etc/passwd", copied, "fifo"])
    if target == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(target)
    return f"link to {target}"


def bent_tensors(path: Path, draw: Draw) -> str:
    """Mutates the header or the data of a safetensors file."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), bytearray(data[8 + size :])
    how = draw.randrange(5)
    if how == 0:
        size = draw.choice([0, 1, size - 1, size + 8, 2**31, 2**40, 2**63])
        path.write_bytes(struct.pack("<Q", size) + data[8:])
        return f"header of {size} bytes"
    if how == 1:
        body[: len(body) // 2] = b"\xff" * (len(body) // 2)
        done = "half of the numbers are NaN"
    elif how == 2:
        name = draw.choice(sorted(header))
        header[draw.choice(["x", "../x", "blocks.99999999.norm1.weight", ""])] = header.pop(name)
        done = f"{name} has another name"
    elif how == 3:
        name = draw.choice(sorted(set(header) - {"__metadata__"}))
        header[name]["dtype"] = draw.choice(["I8", "BOOL", "F64", "F16", "F8_E4M3", "X9", "I32", "U32"])
        done = f"{name} of type {header[name]['dtype']}"
    else:
        header, done = mutated(header, draw)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(body))
    return done


def store_entry(store: Path, change: Callable[[dict], None]) -> None:
    """Changes the first entry and the manifest alike."""
    manifest = load(store / "manifest.json")
    entry = manifest["shards"][0]
    path = store / "shards" / f"{entry['name']}.json"
    change(entry)
    seal(path, {"format": "mapet-token-shard", "version": 2, **entry})
    manifest["images"] = sum(one["images"] for one in manifest["shards"] if isinstance(one.get("images"), int))
    seal(store / "manifest.json", manifest)


def resealed_shard(store: Path, file: Path) -> None:
    store_entry(store, lambda entry: entry.update(bytes=file.stat().st_size, sha256=sha256_file(file)))


def with_checksum(packed: bytes) -> bytes:
    return packed + google_crc32c.value(packed).to_bytes(4, "little")


BOMBS = {
    "zstd without a size": b"\x28\xb5\x2f\xfd\x00\x58" + b"\x01\x00\x00" * 9,
    "zstd of a terabyte": b"\x28\xb5\x2f\xfd\xe0" + (1 << 40).to_bytes(8, "little") + b"\x01\x00\x00" * 9,
    "2**32 strings": compress((2**32 - 1).to_bytes(4, "little") + b"\0" * 400, 3),
    "blosc of 2 GB": bytes([2, 1, 0x94, 2]) + struct.pack("<III", 2**31 - 9, 65_536, 40) + b"\0" * 24,
    "nothing": b"",
}


def bent_zarr(store: Path, draw: Draw) -> str:
    """Mutates metadata, chunks or names in a zipped shard."""
    file = sorted(store.glob("shards/*.zip"))[0]
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    how = draw.randrange(6)
    metadata = sorted(name for name in members if name.endswith("/zarr.json"))
    chunks = sorted(name for name in members if not name.endswith("zarr.json"))
    if how <= 1:
        name = draw.choice(metadata)
        content, done = mutated(json.loads(members[name]), draw)
        members[name] = json.dumps(content).encode()
        done = f"{name}: {done}"
    elif how == 2:
        name, bomb = draw.choice(chunks), draw.choice(sorted(BOMBS))
        members[name], done = with_checksum(BOMBS[bomb]), f"{name}: {bomb}"
    elif how == 3:
        name = draw.choice(sorted(members))
        other = draw.choice(
            ["../outside/bait", "/etc/passwd", ".zgroup", "x/zarr.json", "tokens/.zarray", "tokens/c/9/0/0/0"]
        )
        members[other] = members.pop(name)
        done = f"{name} is called {other}"
    elif how == 4:
        name = draw.choice(["crops/c/0/0/0", "offsets/c/0", "lengths/c/0", "sizes/c/0/0", "crc32/c/0"])
        value = draw.choice([-1, 2**62, float("nan"), float("inf"), 0])
        shapes = {"crops": (32, 4), "sizes": (32, 2)}
        types = {"crops": "<f8", "sizes": "<i4", "crc32": "<u4"}
        column = name.split("/")[0]
        with np.errstate(all="ignore"):
            values = np.full(shapes.get(column, (32,)), value, dtype=float).astype(types.get(column, "<i8"))
        members[name], done = with_checksum(compress(values.tobytes(), 3)), f"{column} {value}"
    else:
        rows = draw.choice([10**6, 10**9, 10**12])
        for name in metadata:
            content = json.loads(members[name])
            content["shape"][0] = rows
            members[name] = json.dumps(content).encode()
        store_entry(store, lambda entry: entry.update(images=rows))
        done = f"{rows} rows"
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    resealed_shard(store, file)
    return done


def bent_tar(store: Path, draw: Draw) -> str:
    """Mutates a member or a header of a tokenised tar."""
    file = sorted(store.glob("shards/*.tar"))[0]
    with tarfile.open(file) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar.getmembers()]
    at, how = draw.randrange(len(members)), draw.randrange(5)
    member, data = members[at]
    done = member.name
    if how == 0 and member.name.endswith("views.json"):
        content, done = mutated(json.loads(data), draw)
        data = json.dumps(content).encode()
    elif how <= 1:
        shape = draw.choice([(2, 8, 8), (10**6, 10**6, 8), (2**40,), (2, 8, 9), (-1, 8, 8), ()])
        descr = draw.choice(["<u2", "|O", "<f8", "<u8"])
        header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
        data, done = (
            b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + b"\0" * 256,
            f"npy {descr} {shape}",
        )
    elif how == 2:
        member.name, done = (
            draw.choice(["../outside/bait.jpg", "/etc/passwd.jpg", "x", "a.cls", "b.tokens.npy"]),
            "renamed",
        )
    elif how == 3:
        member.type, member.linkname = (
            draw.choice([tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE]),
            "/dev/zero",
        )
        data, done = b"", "no file"
    else:
        member.pax_headers = {"size": draw.choice(["-100000", "99999999999999", "x", "-512"])}
        done = f"pax size {member.pax_headers['size']}"
    member.size = len(data)
    members[at] = (member, data)
    with tarfile.open(file, "w", format=tarfile.PAX_FORMAT) as tar:
        for one, content in members:
            tar.addfile(one, io.BytesIO(content))
    resealed_shard(store, file)
    return done


YAML = [
    "a: &a [1]\nb: [*a, *a]\n",
    "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"{c}: &{c} [{', '.join([f'*{p}'] * 10)}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)),
    "a: &a\n  b: *a\n",
    "model: !!python/object/apply:os.system ['touch outside/bait']\n",
    "data:\n  cache: ${oc.env:HOME}\n",
    "data:\n  cache: ${${x}:HOME}\n",
    "data:\n  cache: ${oc.create:${oc.env:HOME}}\n",
    "train:\n  seed: ${train.epochs}\n",
    "train:\n  epochs: ${train.epochs}\n",
    "[" * 5000,
    "train: 5\n",
    "- 1\n",
    "\x00",
    "2024-01-01: 3\n",
    "train:\n  epochs: 1" + "0" * 5000,
    "x: " + "a" * (2 << 20),
]


def bent_yaml(path: Path, draw: Draw) -> str:
    import yaml

    if draw.random() < 0.4:
        text = draw.choice(YAML)
        path.write_text(text)
        return text[:60]
    content, done = mutated(yaml.safe_load(path.read_text()), draw)
    path.write_text(yaml.safe_dump(content))
    return done


def bent_log(path: Path, draw: Draw) -> str:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    at = draw.randrange(len(lines))
    lines[at], done = mutated(lines[at], draw)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return done


def checkpoint(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-*"))


def resealed_checkpoint(run: Path) -> None:
    folder = checkpoint(run)
    state = load(folder / "state.json")
    for name in state["files"]:
        file = folder / name
        state["files"][name] = {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
    seal(folder / "state.json", state)


def read_store(store: Path) -> None:
    opened = mapet.TokenStore(store)
    opened.to_numpy()
    repr(opened), list(opened), opened.skipped()
    mapet.verify(store)
    mapet.inspect(store)


def resume(run: Path) -> None:
    settings = [f"model.{size}" for size in ("dim=32", "depth=1", "heads=2", "image_size=64", "patch_size=8")]
    settings += ["train.epochs=1", "train.batch_size=32", "optimizer.warmup_epochs=0"]
    tokens = run.parent / "tokens-whole"
    mapet.pretrain(run.parent / "images", tokens, run, overrides=settings)


def bend(kind: str, root: Path, draw: Draw) -> tuple[str, Callable[[], object], bool]:
    """Mutates the artifact of a kind in `root`; returns what was done, how it is opened, and whether it must fail."""
    outside = root.parent / "outside"
    book, store, run = root / "codebook", root / "tokens", root / "run"
    is_link = draw.random() < 0.1
    if kind in ("codebook", "centroids"):
        file = book / ("codebook.json" if kind == "codebook" else "centroids.safetensors")
        done = (
            linked(file, outside, draw) if is_link else (bent_json if kind == "codebook" else bent_tensors)(file, draw)
        )
        if kind == "centroids" and not is_link:
            seal(book / "codebook.json", {**load(book / "codebook.json"), "centroids_sha256": sha256_file(file)})
        return done, lambda: (mapet.Codebook.load(book), mapet.inspect(book), mapet.verify(book)), is_link
    if kind in ("manifest", "entry", "zarr"):
        if is_link:
            file = draw.choice([*sorted(store.glob("shards/*.zip")), store / "manifest.json", store / "codebook.json"])
            return linked(file, outside, draw), lambda: read_store(store), True
        if kind == "manifest":
            done = bent_json(draw.choice([store / "manifest.json", store / "codebook.json"]), draw)
        elif kind == "zarr":
            done = bent_zarr(store, draw)
        else:
            notes: list[str] = []

            def change(entry: dict) -> None:
                content, what = mutated(entry, draw)
                entry.clear(), entry.update(content), notes.append(what)

            with contextlib.suppress(KeyError):
                store_entry(store, change)
            done = notes[0]
        return done, lambda: read_store(store), False
    if kind == "tar":
        return bent_tar(root / "tars", draw), lambda: read_store(root / "tars"), False
    if kind in ("state", "tensors"):
        folder = checkpoint(run)
        if kind == "state":
            file = folder / "state.json"
            done = linked(file, outside, draw) if is_link else bent_json(file, draw)
        else:
            file = folder / draw.choice(["model.safetensors", "optimizer.safetensors"])
            done = linked(file, outside, draw) if is_link else bent_tensors(file, draw)
            if not is_link:
                resealed_checkpoint(run)
        if draw.random() < 0.5 and not (is_link and file.name.startswith("optimizer")):
            return done, lambda: mapet.load_weights(run), is_link
        return f"{done}, resumed", lambda: resume(run), is_link
    if kind in ("weights", "export"):
        folder = root / kind
        metadata = folder / ("weights.json" if kind == "weights" else "config.json")
        tensors = folder / "model.safetensors"
        if is_link:
            return linked(draw.choice([metadata, tensors]), outside, draw), lambda: mapet.load_weights(folder), True
        if draw.random() < 0.3:
            done = bent_tensors(tensors, draw)
            field = "sha256" if kind == "weights" else "model_sha256"
            content = {**load(metadata), field: sha256_file(tensors)}
        elif kind == "weights":
            return bent_json(metadata, draw), lambda: mapet.load_weights(folder), False
        else:
            content, done = mutated(load(metadata), draw)
        seal(metadata, content) if kind == "weights" else metadata.write_text(json.dumps(content))
        return done, lambda: mapet.load_weights(folder), False
    if kind == "yaml":
        file = run / "settings.yaml"
        done = bent_yaml(file, draw)
        return done, lambda: (mapet.report([run], html=root / "report.html"), resolve(file)), False
    done = bent_log(run / draw.choice(["metrics.jsonl"]), draw)
    return done, lambda: mapet.report([run], html=root / "report.html"), False


def main(artifacts: Path, work: Path, count: int, kinds: list[str]) -> None:
    opened: list[str] = []
    forbidden = (str(work / "outside"), "/etc/passwd", "/dev/zero")
    watching = False

    def note(event: str, arguments: tuple) -> None:
        if watching and event == "open" and isinstance(arguments[0], str | bytes):
            name = os.path.realpath(os.fsdecode(arguments[0]))
            if name.startswith(forbidden):
                opened.append(name)

    def hang(*_: object) -> None:
        raise TimeoutError("a hang")

    sys.addaudithook(note)
    signal.signal(signal.SIGALRM, hang)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MORE_MEMORY, used + MORE_MEMORY))
    for kind in kinds:
        for number in range(count):
            draw = random.Random(f"{kind} {number}")
            root = work / "artifact"
            shutil.rmtree(work, ignore_errors=True)
            (work / "outside").mkdir(parents=True)
            (work / "outside" / "bait").write_text("bait")
            shutil.copytree(artifacts / BENT[kind], root / BENT[kind])
            (root / "images").symlink_to((artifacts / "images").resolve())
            (root / "tokens-whole").symlink_to(artifacts / "tokens")
            opened.clear()
            done, door, must_fail = bend(kind, root, draw)
            began, outcome, watching = time.process_time(), "opened", True
            signal.alarm(HANG)
            try:
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    door()
            except MapetError as error:
                outcome = "refused" if str(error).strip() and "\n" not in str(error) else f"not one sentence: {error}"
            except BaseException:
                outcome = traceback.format_exc()[-1500:]
            signal.alarm(0)
            watching = False
            if must_fail and outcome == "opened":
                outcome = "followed a link"
            line = {
                "kind": kind,
                "number": number,
                "what": done[:200],
                "outcome": outcome,
                "seconds": time.process_time() - began,
                "outside": opened[:3],
                "memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])

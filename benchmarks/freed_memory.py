"""What keeping freed memory gives on the CPU: a convolutional tower, each way in processes of its own, in turns.

python benchmarks/freed_memory.py [--pairs 5]

Prints one JSON line: images/s with and without `shared.devices.keep_freed_memory`, and the share of processor time that
the kernel took.
"""

import json
import resource
import statistics
import subprocess
import sys
import time

import torch
import typer
from mapet.shared.runtime.devices import keep_freed_memory
from mapet.tokenize_stage.towers.opening import open_tower
from mapet.tokenize_stage.towers.tower import TowerSettings

NAME, SIZE = "timm:tf_efficientnet_lite0", 224
BATCHES, IMAGES = 4, 64


def main(pairs: int = 5, measure: str = typer.Option("", hidden=True)) -> None:
    if measure:
        print(json.dumps(one_process(measure == "kept")))
        return
    found = {"kept": [], "default": []}
    for _ in range(pairs):
        for way, results in found.items():
            command = [sys.executable, __file__, "--measure", way]
            results.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    figure = {"figure": f"tower {NAME}, {SIZE} px: freed memory kept / default, images/s", "pairs": pairs}
    rates = zip(found["kept"], found["default"], strict=True)
    figure["ratio_median"] = round(statistics.median(a["images_per_s"] / b["images_per_s"] for a, b in rates), 2)
    for way, results in found.items():
        figure |= {f"{way}_{name}": round(statistics.median(r[name] for r in results), 3) for name in results[0]}
    print(json.dumps(figure))


def one_process(keep: bool) -> dict[str, float]:
    if keep:
        keep_freed_memory()
    tower = open_tower(TowerSettings(NAME, pretrained="none", image_size=SIZE))
    pixels = torch.randint(256, (IMAGES, 3, SIZE, SIZE), dtype=torch.uint8)
    tower.features(pixels)
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    for _ in range(BATCHES):
        tower.features(pixels)
    spent, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    return {"images_per_s": BATCHES * IMAGES / spent, "kernel_share": system / (user + system)}


if __name__ == "__main__":
    typer.run(main)

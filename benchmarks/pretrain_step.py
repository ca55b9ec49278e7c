"""The pre-training step on the CPU beside a dense-mask MaPeT and a plain timm ViT. Prints one JSON line per figure.

python benchmarks/pretrain_step.py [--size small] [--part dense] [--precision float32] [--mode eager] [--pairs 5]

Parts: `dense` (time and bytes kept for backward against the dense-mask reference, and the ratio of FLOPs, which is what
the time can be at most where products take all of it), `floor` (time for each FLOP against timm), `masks` (what the
reference's masks cost, which its time does not contain), `memory` (peak of a step, beside the reference's), `attention`
(the fused kernel in bfloat16 against float32), `profile` (shares of a step's time in matrix products, attention and the
rest, and the FLOP/s of the first two), `host` (a whole step of the trainer with almost nothing to compute: what Python
and PyTorch take before a device is handed the work). Repeat an option for more values.
"""

import json
import statistics
import time
from typing import Annotated

import torch
import typer
from dense_reference import split_heads
from mapet.shared.runtime.devices import keep_freed_memory
from mapet.throughput.training import Steps
from mapet.train_stage.model.attention import Pattern, Window, attend
from mapet.train_stage.settings import resolve
from steps import (
    PATCHES,
    Batch,
    K,
    Step,
    count_flops,
    interleaved,
    peak_bytes,
    saved_bytes,
    seconds,
    training_batch,
    under,
)
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode


def main(
    size: Annotated[list[str], typer.Option()] = ["small", "base"],  # noqa: B006
    part: Annotated[list[str], typer.Option()] = ["dense", "floor", "masks", "attention"],  # noqa: B006
    precision: Annotated[list[str], typer.Option()] = ["float32", "bfloat16"],  # noqa: B006
    mode: Annotated[list[str], typer.Option()] = ["eager", "compiled"],  # noqa: B006
    batch: int = 8,
    threads: int = 2,
    pairs: int = 5,
    keep_memory: Annotated[bool, typer.Option(help="Both sides as our trainer runs: freed memory is kept.")] = False,
) -> None:
    if keep_memory:
        keep_freed_memory()
    torch.set_num_threads(threads)
    for one in size:
        data = Batch(one, batch)
        about = {"model": f"vit-{one}-16", "batch": batch, "threads": threads, "keep_memory": keep_memory}
        if "masks" in part:
            say("cost of dense masks", about, masks(data))
        if "attention" in part:
            say("attention in bfloat16", about, attention(data, pairs))
        if "memory" in part:
            for name, options in MEMORY.items():
                say(f"peak of a step: {name}", about, {"mb": peak_bytes(data.ours(**options)) >> 20})
            say("peak of a step: dense masks", about, {"mb": peak_bytes(data.dense()) >> 20})
        for how in mode:
            for kind in precision:
                if "dense" in part:
                    say("against dense masks", about, dense(data, kind, how, pairs))
                if "floor" in part:
                    say("against timm's ViT", about, floor(data, kind, how, pairs))
                if "host" in part:
                    say("host time of a step", about, host(one, kind, how, pairs))
                if "profile" in part:
                    for name, step in {"ours": data.ours, "dense masks": data.dense, "timm": data.plain}.items():
                        values = {"precision": kind, "mode": how} | profile(step(how), step(), kind)
                        say(f"where the time goes: {name}", about, values)


def say(figure: str, about: dict, values: dict) -> None:
    print(json.dumps({"figure": figure, **about, **values}), flush=True)


def dense(data: Batch, precision: str, mode: str, pairs: int) -> dict:
    ours, theirs = (under(precision, step) for step in (data.ours(mode), data.dense(mode)))
    times = interleaved(ours, theirs, pairs)
    losses = [step().item() for step in (ours, theirs)]
    kept = [saved_bytes(step) for step in (ours, theirs)]
    flops = [count_flops(step) for step in (data.ours(), data.dense())]
    return {
        "precision": precision,
        "mode": mode,
        **times,
        "flop_ratio": round(flops[1] / flops[0], 3),
        "bytes_ratio": round(kept[0] / kept[1], 3),
        "our_mb_kept": kept[0] >> 20,
        "losses": losses,
    }


def floor(data: Batch, precision: str, mode: str, pairs: int) -> dict:
    flops = [count_flops(step) for step in (data.ours(), data.plain())]
    times = interleaved(*(under(precision, step) for step in (data.ours(mode), data.plain(mode))), pairs)
    ratio = flops[0] / flops[1]
    return {
        "precision": precision,
        "mode": mode,
        **times,
        "flop_ratio": round(ratio, 3),
        "time_for_each_flop_against_timm": round(1 / times["ratio"] / ratio, 3),
    }


KINDS = {
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "mkldnn::_linear_pointwise"),
    "attention": (
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
}


def profile(step: Step, counted: Step, precision: str) -> dict:
    """Shares of the processor time of a warm step by kind of operator, and FLOP/s; `counted` is the step in eager mode,
    whose FLOPs can be counted."""
    step, counted = under(precision, step), under(precision, counted)
    for _ in range(2):
        step().backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        step().backward()
    with FlopCounterMode(display=False) as counter:
        counted().backward()
    flops = {"attention": 0, "products": 0}
    for operator, count in counter.get_flop_counts()["Global"].items():
        flops["attention" if "attend" in str(operator) or "attention" in str(operator) else "products"] += count
    spent = {event.key: event.self_cpu_time_total / 1e6 for event in profiled.key_averages()}
    whole = sum(spent.values())
    by_kind = {kind: sum(spent.get(name, 0.0) for name in names) for kind, names in KINDS.items()}
    shares = {kind: round(seconds / whole, 3) for kind, seconds in by_kind.items()}
    rates = {f"{kind}_gflops": round(flops[kind] / max(by_kind[kind], 1e-9) / 1e9, 1) for kind in KINDS}
    return {"seconds": round(whole, 3), **shares, "rest": round(1 - sum(shares.values()), 3), **rates}


def host(size: str, precision: str, mode: str, pairs: int) -> dict:
    """As many operators as a real step has, on four patches of one image and a dimension of 4 in each head."""
    settings = resolve(
        f"vit-{size}-16",
        [
            "model.dim=12",
            "model.heads=3",
            "model.image_size=32",
            "objective.visible=1",
            "train.batch_size=1",
            f"train.precision={precision}",
            f"execution.compile={mode == 'compiled'}",
        ],
    )
    step = Steps(settings, K, training_batch(1, 32), "cpu").ours()
    for _ in range(3):
        step()
    times = [seconds(step) for _ in range(10 * pairs)]
    measured = {"batch": 1, "ms": round(1e3 * statistics.median(times), 2), "steps": len(times)}
    return {"precision": precision, "mode": mode, **measured}


def masks(data: Batch) -> dict:
    """Building and batching in the loader; the copy to a GPU is not in it."""
    times = []
    for _ in range(5):
        began = time.perf_counter()
        built = [data.build_masks(order) for order in data.order]
        _ = [torch.stack(masks) for masks in zip(*built, strict=True)]
        times.append((time.perf_counter() - began) / len(data.order))
    megabytes = sum(mask[0].nbytes for mask in data.masks) / 2**20
    return {"ms_an_image": round(1e3 * statistics.median(times), 2), "mb_an_image": round(megabytes, 2)}


def attention(data: Batch, pairs: int) -> dict:
    """Forward and backward of the free rows: PyTorch's own bfloat16 kernel / ours, which computes in float32."""
    rows, dim = 1 + PATCHES, data.model.shape.dim
    queries = torch.randn(len(data.order), rows, dim, dtype=torch.bfloat16, requires_grad=True)
    keys_values = torch.randn(len(data.order), rows, 2 * dim, dtype=torch.bfloat16, requires_grad=True)
    everything = Pattern([[Window(slice(0, rows), slice(0, rows))]])

    def plain() -> torch.Tensor:
        parts = [split_heads(part, data.heads) for part in (queries, *keys_values.chunk(2, dim=-1))]
        return scaled_dot_product_attention(*parts).sum()

    times = interleaved(lambda: attend([queries], keys_values, data.heads, everything)[0].sum(), plain, 4 * pairs)
    return {"precision": "bfloat16", **times}


MEMORY = {
    "plain": {"chunk": None},
    "chunked loss": {"chunk": 256},
    "checkpointing": {"chunk": None, "checkpointing": True},
    "chunked loss, checkpointing": {"chunk": 256, "checkpointing": True},
}

if __name__ == "__main__":
    typer.run(main)

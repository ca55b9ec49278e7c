"""Every GPU check and figure of the project: one JSON line each, and a table at the end.

python benchmarks/gpu_check.py [--size base] [--batch 64] [--pairs 10] [--check encoding]

It needs a CUDA device and nothing outside this repository. `--device cpu --size tiny --mode eager --batch 2
--pairs 1` tries the script itself.
"""

import json
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from dense_reference import split_heads
from mapet.quickstart.drawings import write_drawings
from mapet.shared.runtime.devices import choose_workers, peak_flops
from mapet.shared.sources.sources import open_source
from mapet.throughput.rates import compare, timed
from mapet.throughput.tokenizing import Encoding, ready_pixels, with_random_codes
from mapet.tokenize_stage.towers.opening import open_tower
from mapet.tokenize_stage.towers.tower import TowerSettings
from mapet.train_stage.model.attention import attend
from mapet.train_stage.objectives.layouts import make_layout
from mapet.train_stage.objectives.token_loss import token_loss
from mapet.train_stage.weights.published import load_published
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from steps import PATCHES, VISIBLE, Batch, K, count_flops, interleaved, peak_bytes, seconds, under
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

ORACLE = Path(__file__).parent.parent / "tests" / "train_stage" / "oracle"
LIMITS = {"float32": 1e-5, "bfloat16": 2e-2}

Row = tuple[str, Any, str]


def main(
    size: Annotated[list[str], typer.Option()] = ["tiny", "small", "base"],  # noqa: B006
    mode: Annotated[list[str], typer.Option()] = ["eager", "compiled", "flex"],  # noqa: B006
    batch: int = 64,
    pairs: int = 10,
    device: str = "cuda",
    check: Annotated[list[str] | None, typer.Option(help="The checks to run; by default all of them.")] = None,
) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu_check.py measures a CUDA device and finds none; benchmarks/pretrain_step.py measures the CPU.")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    checks = {one.__name__: one for one in CHECKS}
    for unknown in set(check or ()) - set(checks):
        raise typer.BadParameter(f"{unknown!r} is unknown; choose from {', '.join(checks)}.", param_hint="--check")
    given: dict[str, list[tuple]] = {"equality": [()], "steps": [(one, mode, batch, pairs) for one in size]}
    chosen = [(checks[name], arguments) for name in check or checks for arguments in given.get(name, [(batch, pairs)])]
    found = [
        ("device", torch.cuda.get_device_name() if device == "cuda" else "cpu", ""),
        ("torch", torch.__version__, ""),
    ]
    for one, arguments in chosen:
        try:
            for row in one(device, *arguments):
                print(json.dumps(dict(zip(("figure", "value", "remark"), row, strict=True))), flush=True)
                found.append(row)
        except Exception as error:  # one check that cannot run here must not hide the others
            found.append((one.__name__, "failed", f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"))
            print(json.dumps(found[-1]), flush=True)
    table = Table("figure", "value", "remark", title="GPU check")
    for row in found:
        table.add_row(*map(str, row))
    Console(width=160).print(table)
    sys.exit(any("failed" in map(str, row) for row in found))


def equality(device: str) -> Iterator[Row]:
    """Loss and gradients of the published implementation, on every path of execution."""
    expected = load_file(ORACLE / "pretrain_expected.safetensors", device=device)
    order, visible = expected["order"], int(expected["least_number"]) - 1
    targets = expected["tokens"].gather(1, order[:, visible:])
    paths = ["plain", "chunked loss", "checkpointing", "compiled"]
    paths += ["flex", "flex, checkpointing", "flex, compiled"] if device == "cuda" else []
    for precision, limit in LIMITS.items():
        for path in paths:
            model = load_published(ORACLE / "pretrain.pth.tar").to(device)
            model.grad_checkpointing = "checkpointing" in path
            for block in model.blocks if "compiled" in path else ():
                block.compile()
            layout = make_layout("mapet", 16, visible, device=device, flex="flex" in path)
            with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
                rows = model.predict_rows(expected["images"], order, layout)
                loss, _ = token_loss(rows, model.decoder, targets, 7 if path == "chunked loss" else None)
            loss.backward()
            errors = [abs(loss.item() / expected["loss"].item() - 1)]
            errors += [_error(p.grad, expected[f"grad.{name}"]) for name, p in model.named_parameters()]
            verdict = "holds" if max(errors) < limit else "failed"
            yield (
                f"published loss and gradients, {precision}, {path}",
                f"{max(errors):.1e}",
                f"{verdict}: below {limit}",
            )


def _median_seconds(run: Callable[[], object], device: str, times: int) -> float:
    return statistics.median(seconds(run, device) for _ in range(times))


def _error(found: Tensor, expected: Tensor) -> float:
    return ((found.float() - expected).abs().max() / expected.abs().max()).item()


def steps(device: str, size: str, modes: list[str], images: int, pairs: int) -> Iterator[Row]:
    """Step times against both references, MFU, peak memory and the attention kernels that ran."""
    data = Batch(size, images, device)
    flops = count_flops(data.ours())
    relative = flops / count_flops(data.plain())
    name = f"vit-{size}, batch {images}"
    for precision in LIMITS:
        for mode in modes:
            ours = under(precision, data.ours(mode), device)
            dense = interleaved(ours, under(precision, data.dense(mode), device), pairs, device)
            plain = interleaved(ours, under(precision, data.plain(mode), device), pairs, device)
            how = f"{name}, {precision}, {mode}"
            yield f"{how}: ms a step", dense["our_ms"], _use(flops / dense["our_ms"] * 1e3, precision, device)
            yield f"{how}: dense-mask reference / ours", dense["ratio"], f"{dense['their_ms']} ms"
            against = round(1 / plain["ratio"] / relative, 3)
            yield f"{how}: time for each FLOP / timm's ViT", against, f"FLOP ratio {relative:.3f}"
    for what, options in {"": {}, ", checkpointing": {"checkpointing": True}, ", all logits": {"chunk": None}}.items():
        step = data.ours(**options)
        lowered = under("bfloat16", step, device)
        lowered.parameters = step.parameters
        yield f"{name}, bfloat16{what}: peak MB of a step", peak_bytes(lowered, device) >> 20, ""
    yield f"{name}, bfloat16: attention kernels", ", ".join(_kernels(under("bfloat16", data.ours(), device))), ""


def _use(achieved: float, precision: str, device: str) -> str:
    peak = peak_flops(device)
    share = f", MFU {achieved / peak:.1%}" if peak and precision == "bfloat16" else ""
    return f"{achieved / 1e12:.1f} TFLOP/s{share}"


def _kernels(step) -> list[str]:
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    with torch.profiler.profile(activities=activities) as profile:
        step().backward()
    names = {event.key for event in profile.key_averages()}
    return sorted({name[:60] for name in names if re.search(r"flash|fmha|efficient_attention|attend_on", name)})


def attention_kernels(device: str, images: int, pairs: int, heads: int = 12, d: int = 64) -> Iterator[Row]:
    """Forward and backward of one block's attention in bfloat16, each way to run the same pattern."""
    dim, keys = heads * d, 1 + VISIBLE + 2 * (PATCHES - VISIBLE)
    streams = [
        torch.randn(images, rows, dim, device=device, dtype=torch.bfloat16, requires_grad=True)
        for rows in (keys, PATCHES - VISIBLE)
    ]
    keys_values = torch.randn(images, keys, 2 * dim, device=device, dtype=torch.bfloat16, requires_grad=True)
    ways = {"one masked call": _ours(heads, device)}
    ways |= {f"windows, {slices} slices": _by_windows(slices, heads, device) for slices in (1, 2, 4)}
    if device == "cuda":
        ways |= {
            "FlexAttention": _ours(heads, device, flex=True),
            "flash, sliding window": _by_sliding_window(heads, device),
        }
    first = None
    for name, way in ways.items():
        try:
            outputs = way(streams, keys_values)
            first = first or [output.detach() for output in outputs]
            error = max(_error(ours, theirs.float()) for ours, theirs in zip(outputs, first, strict=True))

            def run(way=way) -> None:
                sum(output.float().sum() for output in way(streams, keys_values)).backward()

            run()
            spent = _median_seconds(run, device, pairs)
        except Exception as error:
            yield f"attention, {name}", "not run", f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
        else:
            yield f"attention, {name}: ms", round(1e3 * spent, 2), f"differs by {error:.1e}"


def _ours(heads: int, device: str, flex: bool = False):
    pattern = make_layout("mapet", PATCHES, VISIBLE, device=device, flex=flex).pattern
    return lambda streams, keys_values: attend(streams, keys_values, heads, pattern)


def _by_windows(slices: int, heads: int, device: str):
    layout = make_layout("mapet", PATCHES, VISIBLE, slices=slices, device=device)
    windows = [layout.content_windows, layout.predicted_windows]

    def run(streams: list[Tensor], keys_values: Tensor) -> list[Tensor]:
        keys, values = (split_heads(part, heads) for part in keys_values.chunk(2, dim=-1))
        outputs = []
        for rows, some in zip(streams, windows, strict=True):
            queries = split_heads(rows, heads)
            parts = [
                scaled_dot_product_attention(
                    queries[:, :, one.rows], keys[:, :, one.keys], values[:, :, one.keys], attn_mask=one.mask
                )
                for one in some
            ]
            outputs.append(torch.cat(parts, dim=2).transpose(1, 2).flatten(2))
        return outputs

    return run


def _by_sliding_window(heads: int, device: str):
    """Patches and queries see a window of N + 1 keys that slides by one key a row: flash attention needs no mask."""
    from torch.nn.attention.varlen import varlen_attn

    predicted, free = PATCHES - VISIBLE, 1 + PATCHES

    def slide(rows: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        images, count, seen = rows.shape[0], rows.shape[2], keys.shape[2]
        starts = [torch.arange(images + 1, device=device, dtype=torch.int32) * each for each in (count, seen)]
        packed = [part.transpose(1, 2).flatten(0, 1).contiguous() for part in (rows, keys, values)]
        output = varlen_attn(*packed, *starts, count, seen, window_size=(free - 1, 0))
        return output.unflatten(0, (images, count)).transpose(1, 2)

    def run(streams: list[Tensor], keys_values: Tensor) -> list[Tensor]:
        content, queries = (split_heads(rows, heads) for rows in streams)
        keys, values = (split_heads(part, heads) for part in keys_values.chunk(2, dim=-1))
        alone = scaled_dot_product_attention(content[:, :, :free], keys[:, :, :free], values[:, :, :free])
        patches = slide(content[:, :, free:], keys[:, :, 1:], values[:, :, 1:])
        last = free + predicted - 1
        read = slide(queries, keys[:, :, :last], values[:, :, :last])
        return [rows.transpose(1, 2).flatten(2) for rows in (torch.cat([alone, patches], dim=2), read)]

    return run


def tower(device: str, images: int, pairs: int) -> Iterator[Row]:
    """Stage one: patch features of a ViT-B/16 tower (random weights), and what bfloat16 and compiling do to tokens."""
    pixels = torch.randint(256, (images, 3, 224, 224), dtype=torch.uint8)
    settings = {precision: TowerSettings("ViT-B-16", pretrained="none", precision=precision) for precision in LIMITS}
    tokens, codebook = {}, None
    for precision, chosen in settings.items():
        torch.manual_seed(0)
        opened = open_tower(chosen, device)
        features = opened.features(pixels)
        spent = _median_seconds(partial(opened.features, pixels), device, pairs)
        yield f"tower ViT-B-16, {precision}: images/s", round(images / spent, 1), ""
        opened.compile()
        compiled = opened.features(pixels)
        again = _median_seconds(partial(opened.features, pixels), device, pairs)
        yield f"tower ViT-B-16, {precision}, compiled: images/s", round(images / again, 1), f"{spent / again:.2f} times"
        codebook = features.reshape(-1, opened.dim)[:256] if codebook is None else codebook
        for name, found in {precision: features, f"compiling {precision}": compiled}.items():
            tokens[name] = torch.cdist(found.reshape(-1, opened.dim), codebook).argmin(1)
    for name in ("bfloat16", "compiling float32"):
        yield f"tokens that {name} changes (random weights)", _differ(tokens[name], tokens["float32"]), ""
    differ = _differ(tokens["compiling bfloat16"], tokens["bfloat16"])
    yield "tokens that compiling bfloat16 changes (random weights)", differ, ""


def _differ(some: Tensor, others: Tensor) -> str:
    return f"{(some != others).float().mean().item():.2%}"


def encoding(device: str, images: int, pairs: int) -> Iterator[Row]:
    """encode-shards from bytes to tokens once its workers have started, beside the tower's forward pass alone."""
    with tempfile.TemporaryDirectory() as folder:
        write_drawings(Path(folder), 8 * images, seed=1, per_tar=8 * images)
        (shard,) = open_source(folder)
        records, workers = shard.index(), choose_workers(None, device)
        for precision in LIMITS:
            opened = open_tower(TowerSettings("ViT-B-16", pretrained="none", precision=precision), device)
            pixels = ready_pixels(records[:images], opened.preprocess)
            tokenizer = with_random_codes(opened, K, pixels[:16])
            sides = Encoding(tokenizer, records, pixels, workers)
            rates = compare(sides.encode, timed(sides.forward, images), seconds=2 * pairs)
            remark = f"{rates.rate:.0f} of {rates.bare_rate:.0f} images/s, {workers} workers; target 0.95"
            yield f"encode-shards / bare ViT-B-16, {precision}, batch {images}", round(rates.ratio, 3), remark
            features = sides.features()
            alone = compare(timed(partial(tokenizer.tokens, features), images), timed(sides.forward, images), pairs / 2)
            yield f"assignment to {K} codes / tower, {precision}: time", round(1 / alone.ratio, 3), ""
            here = features.cpu().numpy()
            found, nearest = tokenizer.tokens(features).cpu().numpy(), tokenizer.assign(here)[0]
            wrong = ~tokenizer.nearly_equal(here, found, nearest.astype(found.dtype))
            remark = f"{'failed' if wrong.any() else 'holds'}: {wrong.sum()} beyond rounding"
            yield f"tokens that differ from FAISS's, {precision}", f"{(found != nearest).mean():.2%}", remark


CHECKS = (equality, attention_kernels, tower, encoding, steps)

if __name__ == "__main__":
    typer.run(main)

"""Train the demo's small CLIP from drawn pictures and their captions, and write it for open_clip to open.

    python -m mapet.quickstart.train_tower --out quickstart/tower

Every step sees pictures it has not seen before, drawn on the fly from `--seed`. The run is deterministic
given that seed, `--threads` and the machine: another processor or PyTorch version rounds sums differently.
The seed must be at least 1000, because the demo draws its own pictures from seeds 0 to 9 and must find them
unseen. Needs `mapet`, open_clip_torch, scikit-learn and faiss-cpu.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import open_clip
import torch
from open_clip.model import CLIP
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset

from ..shared.runtime.console import running_command, say
from .drawings import CLASSES, SURFACES, draw

# The text tower is only as wide as a few dozen words need: its table of 49,408 tokens is most of the file.
CONFIG: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 64,
        "vision_cfg": {
            "image_size": 64,
            "patch_size": 8,
            "width": 128,
            "layers": 4,
            "head_width": 64,
            "pool_type": "avg",
        },
        "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 24, "heads": 2, "layers": 2},
    },
    "preprocess_cfg": {
        "size": [64, 64],
        "mode": "RGB",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
        "fill_color": 0,
    },
}
PROMPTS = ("a drawing of a {}.", *(f"a picture of a {surface} {{}}" for surface in SURFACES))
TEST_SEED, PROBE_SEED = 2000, 2001


class Drawings(Dataset[tuple[torch.Tensor, torch.Tensor, int]]):
    """Drawings of one series as float32 images (3, 64, 64) in [-1, 1], int64 tokens (32,) and int labels.

    The captions of the first `named` drawings are cut down to a sentence that names the class alone.
    """

    def __init__(self, seed: int, count: int, named: int = 0) -> None:
        self.seed, self.count, self.named = seed, count, named
        self.tokenizer = open_clip.SimpleTokenizer(context_length=CONFIG["model_cfg"]["text_cfg"]["context_length"])

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        drawing = draw(index, self.seed)
        image = torch.from_numpy(np.array(drawing.image)).permute(2, 0, 1).float() / 127.5 - 1
        caption = PROMPTS[0].format(CLASSES[drawing.label]) if index < self.named else drawing.caption
        return image, self.tokenizer(caption)[0], drawing.label


def optimizer_of(model: CLIP, lr: float) -> torch.optim.AdamW:
    """AdamW that decays matrices only: decayed gains, biases and temperature would drift to zero."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))


def train(seed: int, steps: int, batch: int, lr: float, warmup: int, named: float) -> CLIP:
    """Trains a new model with CLIP's contrastive loss; a message every 50 steps tells the mean loss.

    For the first share `named` of the steps the captions name the class alone.
    """
    torch.manual_seed(seed)
    model = CLIP(**CONFIG["model_cfg"])
    optimizer, criterion = optimizer_of(model, lr), open_clip.ClipLoss()
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * s / steps))
    )
    # Colours tell most captions of a batch apart, so whole captions teach outlines only after many times the
    # steps; names alone come first. In the order of their indexes each batch holds every class equally often.
    data = Drawings(seed, steps * batch, named=int(steps * named) * batch)
    batches = DataLoader(data, batch, num_workers=1, prefetch_factor=8)
    losses, start = [], time.monotonic()
    # PyTorch's fused attention is several times slower than the plain one on a processor at 65 tokens.
    with sdpa_kernel(SDPBackend.MATH):
        for step, (images, texts, _) in enumerate(batches, 1):
            with torch.autocast("cpu", torch.bfloat16):
                image_features, text_features, scale = model(images, texts)
            loss = criterion(image_features.float(), text_features.float(), scale.float())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            model.logit_scale.data.clamp_(0, math.log(100))
            losses.append(loss.item())
            if step % 50 == 0 or step == steps:
                recent = np.mean(losses[-50:])
                say(f"step {step} loss {recent:.3f} {time.monotonic() - start:.0f} s")
            if step % 500 == 0 and step < steps:
                say(f"step {step} zero-shot {zero_shot(model, 500):.3f}")
                model.train()
    return model


def save(model: CLIP, out: Path) -> None:
    """Writes `open_clip_config.json` and the weights as float16, which halves the file at no measured loss."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "open_clip_config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")
    weights = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, out / "open_clip_model.safetensors", metadata={"format": "pt"})


@torch.inference_mode()
def zero_shot(model: CLIP, count: int) -> float:
    """Share of `count` fresh drawings whose class has the nearest prompts of `PROMPTS`."""
    model.eval()
    data = Drawings(TEST_SEED, count)
    prompts = [prompt.format(name) for name in CLASSES for prompt in PROMPTS]
    text = model.encode_text(data.tokenizer(prompts), normalize=True).view(len(CLASSES), len(PROMPTS), -1).mean(1)
    hits = 0
    for images, _, labels in DataLoader(data, 250):
        scores = model.encode_image(images, normalize=True) @ torch.nn.functional.normalize(text, dim=-1).T
        hits += (scores.argmax(1) == labels).sum().item()
    return hits / count


@torch.inference_mode()
def patch_features(model: CLIP, seed: int, count: int, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Patch features (count, 64, width), float32, after a layer (-1: the last), and labels (count,)."""
    model.eval()
    features, labels = [], []
    for images, _, targets in DataLoader(Drawings(seed, count), 250):
        grid = model.visual.forward_intermediates(images, indices=[layer], intermediates_only=True)
        features.append(grid["image_intermediates"][0].flatten(2).transpose(1, 2).numpy())
        labels.append(targets.numpy())
    return np.ascontiguousarray(np.concatenate(features)), np.concatenate(labels)


def probe(train_set: tuple[np.ndarray, np.ndarray], test_set: tuple[np.ndarray, np.ndarray], c: float) -> float:
    """Test accuracy of a logistic regression on standardised features, shape (count, dim)."""
    mean, std = train_set[0].mean(0), train_set[0].std(0) + 1e-6
    model = LogisticRegression(C=c, max_iter=300).fit((train_set[0] - mean) / std, train_set[1])
    return float(model.score((test_set[0] - mean) / std, test_set[1]))


def report_layer(model: CLIP, layer: int, codes: int = 128) -> None:
    """Says how well one layer's mean patch feature, and its histogram of k-means tokens, predict the class."""
    (x, y), (test_x, test_y) = (
        patch_features(model, seed, count, layer) for seed, count in ((PROBE_SEED, 4000), (TEST_SEED, 1000))
    )
    pooled = probe((x.mean(1), y), (test_x.mean(1), test_y), c=0.1)
    kmeans = faiss.Kmeans(x.shape[2], codes, niter=20, seed=0)
    kmeans.train(x[:1000].reshape(-1, x.shape[2]))

    def histogram(features: np.ndarray) -> np.ndarray:
        tokens = kmeans.index.search(features.reshape(-1, features.shape[2]), 1)[1].reshape(len(features), -1)
        return np.stack([np.bincount(row, minlength=codes) for row in tokens]).astype(np.float32)

    tokens = probe((histogram(x), y), (histogram(test_x), test_y), c=0.1)
    say(f"layer {layer}: linear probe {pooled:.3f}, histogram of {codes} tokens {tokens:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the configuration and the weights")
    parser.add_argument("--seed", type=int, default=1000, help="of the weights and the drawings, 1000 or more")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=100, help="steps until the peak")
    parser.add_argument("--named", type=float, default=0.45, help="share of steps on captions of the class alone")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.seed < 1000 or args.seed in (TEST_SEED, PROBE_SEED):
        parser.error(f"--seed must be at least 1000 and neither {TEST_SEED} nor {PROBE_SEED}")
    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(args.threads)
    save(train(args.seed, args.steps, args.batch, args.lr, args.warmup, args.named), args.out)
    # Measured on what was written, so that the rounding to float16 counts.
    model = open_clip.create_model(f"local-dir:{args.out}")
    say(f"zero-shot accuracy on 1,000 new drawings {zero_shot(model, 1000):.3f}")
    for layer in (-1, -2):
        report_layer(model, layer)


if __name__ == "__main__":
    with running_command():
        main()

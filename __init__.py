"""MaPeT: tokenizer-first pre-training of Vision Transformers.

Each command of `mapet` is one of the functions below, with the same defaults. They are imported on first use, so
that `import mapet` and `mapet --help` stay instant.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .quickstart.demo import demo
    from .shared.doctor import doctor
    from .shared.tokens.codebook import Codebook
    from .shared.tokens.store import TokenStore
    from .studies.plan import study_dry_run
    from .studies.study import study
    from .throughput.bench import bench
    from .tokenize_stage.build_codebook import build_codebook
    from .tokenize_stage.encode_shards import encode_shards, encode_shards_dry_run
    from .tokenize_stage.import_tokens import import_codebook, import_tokenizer, import_tokens
    from .tokenize_stage.inspect import inspect
    from .tokenize_stage.tokenizers.base import Tokenizer
    from .tokenize_stage.tokenizers.opening import load_tokenizer, read_tokenizer
    from .tokenize_stage.verify import verify
    from .train_stage.evaluate import evaluate
    from .train_stage.export import export
    from .train_stage.features import features
    from .train_stage.finetune import finetune, finetune_dry_run
    from .train_stage.import_weights import import_weights
    from .train_stage.model.mapet import MaPeT
    from .train_stage.predict import predict
    from .train_stage.pretrain import pretrain, pretrain_dry_run
    from .train_stage.probe import probe
    from .train_stage.report import report
    from .train_stage.segment import segment, segment_dry_run
    from .train_stage.weights.published import load_published
    from .train_stage.weights.read import load, load_weights

__version__ = "0.1.0"

_HOME = {
    "Codebook": ".shared.tokens.codebook",
    "MaPeT": ".train_stage.model.mapet",
    "TokenStore": ".shared.tokens.store",
    "Tokenizer": ".tokenize_stage.tokenizers.base",
    "bench": ".throughput.bench",
    "build_codebook": ".tokenize_stage.build_codebook",
    "demo": ".quickstart.demo",
    "doctor": ".shared.doctor",
    "encode_shards": ".tokenize_stage.encode_shards",
    "encode_shards_dry_run": ".tokenize_stage.encode_shards",
    "evaluate": ".train_stage.evaluate",
    "export": ".train_stage.export",
    "features": ".train_stage.features",
    "finetune": ".train_stage.finetune",
    "finetune_dry_run": ".train_stage.finetune",
    "import_codebook": ".tokenize_stage.import_tokens",
    "import_tokenizer": ".tokenize_stage.import_tokens",
    "import_tokens": ".tokenize_stage.import_tokens",
    "import_weights": ".train_stage.import_weights",
    "inspect": ".tokenize_stage.inspect",
    "load_published": ".train_stage.weights.published",
    "load_tokenizer": ".tokenize_stage.tokenizers.opening",
    "load": ".train_stage.weights.read",
    "load_weights": ".train_stage.weights.read",
    "predict": ".train_stage.predict",
    "pretrain": ".train_stage.pretrain",
    "pretrain_dry_run": ".train_stage.pretrain",
    "probe": ".train_stage.probe",
    "read_tokenizer": ".tokenize_stage.tokenizers.opening",
    "report": ".train_stage.report",
    "segment": ".train_stage.segment",
    "segment_dry_run": ".train_stage.segment",
    "study": ".studies.study",
    "study_dry_run": ".studies.plan",
    "verify": ".tokenize_stage.verify",
}

__all__ = [
    "Codebook",
    "MaPeT",
    "TokenStore",
    "Tokenizer",
    "bench",
    "build_codebook",
    "demo",
    "doctor",
    "encode_shards",
    "encode_shards_dry_run",
    "evaluate",
    "export",
    "features",
    "finetune",
    "finetune_dry_run",
    "import_codebook",
    "import_tokenizer",
    "import_tokens",
    "import_weights",
    "inspect",
    "load",
    "load_published",
    "load_tokenizer",
    "load_weights",
    "predict",
    "pretrain",
    "pretrain_dry_run",
    "probe",
    "read_tokenizer",
    "report",
    "segment",
    "segment_dry_run",
    "study",
    "study_dry_run",
    "verify",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name], __name__), name)
    globals()[name] = value  # a sub-module of the same name (`demo`) must not shadow the function
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

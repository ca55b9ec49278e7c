"""The quality of tokens without training: what `mapet tokenize inspect` reports as "quality", from a store alone."""

from typing import Any, TypedDict

import numpy as np

from .bigrams import BothWays, bigrams_of
from .information import Information, Joint, Score, information, ranks, rolled, score
from .sample import SampledImages


class Classes(TypedDict):
    """What codes say about the class of their image, over the labelled images of the sample.

    Purity rises with K by itself: in the extreme every token has a code of its own, and purity is 1. `chance` is the
    same figure after the labels were exchanged between images, each image keeping its tokens together (the mean of
    three permutations). Exchanging the labels of single tokens, as the closed formula of adjusted mutual information
    does, would understate chance, since the tokens of an image share their label and are alike.
    """

    classes: int
    images: int
    tokens: int
    purity: Score
    """Share of tokens whose image has the most common class of their code (HuBERT's phone purity, with classes)."""
    class_purity: Score
    """Share of tokens that have the most common code of their image's class (HuBERT's cluster purity). It falls with K;
    one code for all tokens has 1, and so has its chance."""
    information: Information | None
    """Of classes and codes; None where there is one class and one code."""


class Quality(TypedDict):
    """Figures of one store that need no training, over a sample of at most about 4 million tokens.

    The sample are the images whose keys have the smallest hashes, so that two stores of the same images are measured
    on the same images.
    """

    images: int
    tokens: int
    labels: Classes | None
    """None where no sampled image has a label."""
    bigrams: BothWays
    pictures: Any
    """`measure.PictureQuality`; None without the images and the codebook."""


def quality_of(images: SampledImages, k: int) -> Quality:
    """The figures of a sample of a store with codes below `k`."""
    return {
        "images": len(images.tokens),
        "tokens": images.tokens.size,
        "labels": _classes(images),
        "bigrams": bigrams_of(images, k),
        "pictures": None,
    }


def _classes(images: SampledImages) -> Classes | None:
    labelled = images.labels >= 0
    if not labelled.any():
        return None
    codes = ranks(images.tokens[labelled].reshape(int(labelled.sum()), -1))
    labels = ranks(images.labels[labelled])

    def joint(by: int) -> Joint:
        return Joint.of(np.broadcast_to(np.roll(labels, by)[:, None], codes.shape), codes)

    own, others = joint(0), [joint(by) for by in rolled(len(labels))]
    return {
        "classes": int(labels.max()) + 1,
        "images": len(labels),
        "tokens": codes.size,
        "purity": score(own.purity(), (other.purity() for other in others)),
        "class_purity": score(own.inverse_purity(), (other.inverse_purity() for other in others)),
        "information": information(own, others),
    }

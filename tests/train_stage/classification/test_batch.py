"""A batch of fine-tuning is a pure function of its places, and leaves the random states of the process alone."""

import random

import numpy as np
import torch
from mapet.train_stage.classification.augment import Augment
from mapet.train_stage.classification.batch import LoadLabelled
from mapet.train_stage.classification.labelled_set import labelled_set
from mapet.train_stage.evaluation.labelled import labelled_images
from mapet.train_stage.settings import resolve_finetuning
from mapet.train_stage.weights.weights import Input

PLACES = [(0, 3), (2, 7), (1, 3)]


def states() -> tuple:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_samples_do_not_depend_on_their_batch_or_on_global_random_states(chain):
    images = labelled_set(labelled_images(chain.images).records)
    chosen = resolve_finetuning(None, ["augment.rand_augment=rand-m9-mstd0.5"], 32, Input().to_json())
    load = LoadLabelled(images, chosen, 2, Augment(chosen))
    together = load(PLACES)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    before = states()
    apart = [load([place]) for place in reversed(PLACES)]
    assert states() == before
    for name, values in together.items():
        assert torch.equal(values, torch.cat([one[name] for one in reversed(apart)])), name
    assert not torch.equal(together["pixels"][0], together["pixels"][2])

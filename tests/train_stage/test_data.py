"""The join by key: right pixels beside right tokens, or a sentence that says which image is wrong."""

import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from mapet.shared.codebook import Codebook
from mapet.shared.errors import DataError, UsageError
from mapet.shared.loading import batches
from mapet.shared.sources import read_records
from mapet.shared.token_store import TokenStore
from mapet.shared.views import view_of_epoch
from mapet.tokenize_stage.encode_shards import encode_shards
from mapet.tokenize_stage.towers import TowerSettings, open_tower
from mapet.train_stage.data import LoadSample, check_grid, jitter
from mapet.train_stage.join import join
from mapet.train_stage.settings import DataSettings, resolve
from mapet.train_stage.tokenised import TokenisedImages
from PIL import Image
from torchvision.transforms.functional import adjust_brightness, adjust_contrast, adjust_saturation

GRID = ["model.image_size=64", "model.patch_size=8", "data.color_jitter=0"]


def loader(chain, *overrides: str, seed: int = 0) -> LoadSample:
    settings = resolve("vit-tiny-16", [*GRID, f"train.seed={seed}", *overrides])
    return LoadSample(join(chain.images, TokenStore(chain.tokens)), settings)


def keys_of(data: TokenisedImages) -> set[str]:
    return {data.key(index) for index in range(len(data))}


def test_a_samples_pixels_give_its_tokens_when_encoded_again(chain, tower):
    """The student's own pixels through the tower: only an image and the tokens of that very view agree."""
    load, book, frozen = loader(chain), Codebook.load(chain.codebook), open_tower(TowerSettings(tower))
    samples = [load((0, index)) for index in range(0, 96, 8)]
    pixels = torch.stack([torch.from_numpy(sample["pixels"]) for sample in samples])
    found, _ = book.assign(frozen.features(pixels).reshape(-1, frozen.dim).numpy())
    for sample, tokens in zip(samples, found.reshape(len(samples), -1), strict=True):
        assert np.array_equal(tokens[sample["order"]], sample["tokens"])


def test_every_epoch_sees_the_pixels_and_the_tokens_of_one_stored_view(chain, tower, tmp_path: Path):
    """Crop and flip are shared for every view: what the student sees, encoded again, gives its tokens."""
    out = tmp_path / "tokens"
    store = encode_shards(chain.images, chain.codebook, out, batch_size=16, crop="random-resized", views=4)
    load = LoadSample(join(chain.images, store), resolve("vit-tiny-16", GRID))
    book, frozen = Codebook.load(chain.codebook), open_tower(TowerSettings(tower))
    indices = range(0, 96, 12)
    flips = set()
    for index in indices:
        samples = [load((epoch, index)) for epoch in range(8)]
        pixels = torch.stack([torch.from_numpy(sample["pixels"]) for sample in samples])
        found, _ = book.assign(frozen.features(pixels).reshape(-1, frozen.dim).numpy())
        tokens = found.reshape(8, -1)
        agree = np.array([[(row[one["order"]] == one["tokens"]).mean() for one in samples] for row in tokens])
        # Pillow cut what was encoded, so that a token on the border between two may differ.
        assert agree.diagonal().min() > 0.95
        assert (agree.max(axis=1) == agree.diagonal()).all()
        seen = [sample["pixels"].tobytes() for sample in samples]
        assert len(set(seen[:4])) == 4
        assert set(seen[4:]) == set(seen[:4])
        flips |= set(load.images.flips[load.images.rows[index]].tolist())
    assert flips == {False, True}
    orders = {tuple(view_of_epoch(4, 0, epoch, load.images.key(index)) for epoch in range(4)) for index in indices}
    assert len(orders) > 1


def test_images_that_were_skipped_when_encoded_are_left_out(chain, tmp_path: Path):
    tar = tmp_path / "some.tar"
    shutil.copy(chain.tars[0], tar)
    records = read_records(tar)
    with open(tar, "r+b") as file:
        file.seek(records[3].offset)
        file.write(bytes(100))
    store = encode_shards(tar, chain.codebook, tmp_path / "tokens", batch_size=16, on_error="skip")
    assert [key for _, key, _ in store.skipped()] == [records[3].key]
    assert keys_of(join(tar, store)) == {record.key for record in records} - {records[3].key}
    with pytest.raises(DataError, match="32 of 63 images have no tokens"):
        join([tar, chain.tars[1]], store)


def test_samples_are_a_pure_function_of_seed_epoch_and_key(chain, tmp_path: Path):
    shuffled = tmp_path / "images"
    shutil.copytree(chain.images, shuffled)
    for number, path in enumerate(sorted(shuffled.glob("*.tar"))):
        path.rename(shuffled / f"{9 - number}.tar")
    one = loader(chain, "data.color_jitter=0.4")
    other = LoadSample(join(shuffled, TokenStore(chain.tokens)), one.settings)
    place = {other.images.key(index): index for index in range(len(other.images))}
    for index in (0, 50, 95):
        first, second = one((3, index)), other((3, place[one.images.key(index)]))
        assert all(np.array_equal(first[name], second[name]) for name in first)
    assert not np.array_equal(one((3, 0))["order"], one((4, 0))["order"])
    assert not np.array_equal(one((3, 0))["order"], one((3, 1))["order"])
    assert not np.array_equal(one((3, 0))["order"], loader(chain, seed=1)((3, 0))["order"])


def test_a_sample_does_not_depend_on_threads_or_on_which_process_loads_it(chain):
    load = loader(chain, "data.color_jitter=0.4", "model.image_size=96", "model.patch_size=12")
    places = [[(0, index) for index in range(8)], [(1, index) for index in range(40, 48)]]
    here = list(batches(load, places, 0))
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    threaded = list(batches(load, places, 0))
    torch.set_num_threads(threads)
    for others in (threaded, list(batches(load, places, 1)), list(batches(load, places, 3))):
        for ours, theirs in zip(here, others, strict=True):
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_jitter_is_torchvisions_for_each_adjustment():
    pixels = smooth_noise(32)
    image = Image.fromarray(pixels.transpose(1, 2, 0))

    class Only:
        """Draws the factor 1.3 for one of the adjustments, 1 for the others."""

        def __init__(self, which: int):
            self.which = which

        def uniform(self, low: float, high: float, size: int) -> np.ndarray:
            return np.where(np.arange(size) == self.which, 1.3, 1.0)

        def permutation(self, count: int) -> range:
            return range(count)

    for which, adjust in enumerate((adjust_brightness, adjust_contrast, adjust_saturation)):
        expected = np.asarray(adjust(image, 1.3)).transpose(2, 0, 1).astype(int)
        assert np.abs(jitter(pixels, 0.4, Only(which)) - expected).max() <= 1
        assert np.abs(pixels - expected).max() > 20


def smooth_noise(side: int) -> np.ndarray:
    coarse = np.random.default_rng(0).integers(20, 200, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)).transpose(2, 0, 1)


def test_jitter_changes_colours_only(chain):
    plain, jittered = (loader(chain, f"data.color_jitter={strength}")((0, 0)) for strength in (0, 0.4))
    assert np.array_equal(plain["order"], jittered["order"])
    assert not np.array_equal(plain["pixels"], jittered["pixels"])
    shape = [np.sign(np.diff(sample["pixels"].astype(float).sum(0), axis=0)) for sample in (plain, jittered)]
    assert (shape[0] * shape[1] >= 0).mean() > 0.97


def test_images_without_tokens_are_named_or_skipped_as_chosen(chain, tmp_path: Path):
    encode_shards(chain.tars[0], chain.codebook, tmp_path / "tokens")
    store = TokenStore(tmp_path / "tokens")
    with pytest.raises(DataError, match="64 of 96 images have no tokens"):
        join(chain.images, store)
    assert len(join(chain.images, store, skip_missing=True)) == 32
    with pytest.raises(DataError, match="32 of 32"):
        join(chain.tars[1], store, skip_missing=True)


def test_training_on_some_of_the_shards_is_allowed(chain):
    assert len(join(chain.tars[1], TokenStore(chain.tokens))) == 32


def test_an_image_replaced_since_encoding_stops_the_loader(chain, tmp_path: Path):
    shutil.copytree(chain.images, tmp_path / "images")
    tar = sorted((tmp_path / "images").glob("*.tar"))[0]
    with tarfile.open(tar) as archive:
        member = next(member for member in archive if member.name.endswith(".jpg"))
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "JPEG")
    data = bytearray(tar.read_bytes())
    data[member.offset_data : member.offset_data + member.size] = buffer.getvalue().ljust(member.size, b"\0")
    tar.write_bytes(data)
    load = LoadSample(join(tmp_path / "images", TokenStore(chain.tokens)), resolve("vit-tiny-16", GRID))
    with pytest.raises(DataError, match="CRC32"):
        load((0, 0))


def test_a_truncated_token_shard_stops_the_join(chain, tmp_path: Path):
    shutil.copytree(chain.tokens, tmp_path / "tokens")
    shard = sorted((tmp_path / "tokens" / "shards").glob("*.zip"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(DataError, match=shard.name):
        join(chain.images, TokenStore(tmp_path / "tokens"))


def test_a_grid_that_does_not_fit_says_which_sizes_would(chain):
    settings = resolve("vit-tiny-16", ["model.image_size=64", "model.patch_size=16"])
    with pytest.raises(UsageError, match=r"image_size=128 with model\.patch_size=16, or model\.patch_size=8"):
        check_grid(TokenStore(chain.tokens), settings.model)


def test_pixels_are_decoded_at_the_students_own_resolution(chain):
    assert loader(chain, "model.image_size=96", "model.patch_size=12")((0, 0))["pixels"].shape == (3, 96, 96)


def test_settings_of_data_are_checked():
    with pytest.raises(UsageError, match="color_jitter"):
        DataSettings(color_jitter=2)

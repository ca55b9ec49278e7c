"""Batches: the pixels of a stored view beside the tokens of that very view, or an error that names the image."""

import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mapet.shared.errors import DataError, UsageError
from mapet.shared.images.views import view_of_epoch
from mapet.shared.runtime.loader import batches
from mapet.shared.sources.sources import read_records
from mapet.shared.tokens.codebook import Codebook
from mapet.shared.tokens.store import TokenStore
from mapet.tokenize_stage.encode_shards import encode_shards
from mapet.tokenize_stage.towers.opening import open_tower
from mapet.tokenize_stage.towers.tower import TowerSettings
from mapet.train_stage.data.batch import LoadBatch, check_grid
from mapet.train_stage.data.color_jitter import BRIGHTNESS, CONTRAST, SATURATION, draw_jitter, jitter
from mapet.train_stage.data.dataset import TokenisedImages
from mapet.train_stage.data.join import join
from mapet.train_stage.settings import DataSettings, resolve
from PIL import ExifTags, Image
from torchvision.transforms.functional import adjust_brightness, adjust_contrast, adjust_saturation

GRID = ["model.image_size=64", "model.patch_size=8", "data.color_jitter=0"]


def loader(chain, *overrides: str, seed: int = 0) -> LoadBatch:
    settings = resolve("vit-tiny-16", [*GRID, f"train.seed={seed}", *overrides])
    return LoadBatch(join(chain.images, TokenStore(chain.tokens)), settings)


def sample_of(load: LoadBatch, epoch: int, index: int) -> dict[str, np.ndarray]:
    return {name: values[0].numpy() for name, values in load([(epoch, index)]).items()}


def keys_of(data: TokenisedImages) -> set[str]:
    return {data.key(index) for index in range(len(data))}


def test_a_samples_pixels_give_its_tokens_when_encoded_again(chain, tower):
    """The student's own pixels through the tower: only an image and the tokens of that very view agree."""
    load, book, frozen = loader(chain), Codebook.load(chain.codebook), open_tower(TowerSettings(tower))
    samples = [sample_of(load, 0, index) for index in range(0, 96, 8)]
    pixels = torch.stack([torch.from_numpy(sample["pixels"]) for sample in samples])
    found, _ = book.assign(frozen.features(pixels).reshape(-1, frozen.dim).numpy())
    for sample, tokens in zip(samples, found.reshape(len(samples), -1), strict=True):
        assert np.array_equal(tokens[sample["order"]], sample["tokens"])


def test_every_epoch_sees_the_pixels_and_the_tokens_of_one_stored_view(chain, tower, tmp_path: Path):
    """Crop and flip are shared for every view: what the student sees, encoded again, gives its tokens."""
    out = tmp_path / "tokens"
    store = encode_shards(chain.images, chain.codebook, out, batch_size=16, crop="random-resized", views=4)
    load = LoadBatch(join(chain.images, store), resolve("vit-tiny-16", GRID))
    book, frozen = Codebook.load(chain.codebook), open_tower(TowerSettings(tower))
    indices = range(0, 96, 12)
    flips = set()
    for index in indices:
        samples = [sample_of(load, epoch, index) for epoch in range(8)]
        pixels = torch.stack([torch.from_numpy(sample["pixels"]) for sample in samples])
        found, _ = book.assign(frozen.features(pixels).reshape(-1, frozen.dim).numpy())
        tokens = found.reshape(8, -1)
        agree = np.array([[(row[one["order"]] == one["tokens"]).mean() for one in samples] for row in tokens])
        # The tower saw Pillow's crop, so a patch that is almost equally near two centroids may get the other token.
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
    other = LoadBatch(join(shuffled, TokenStore(chain.tokens)), one.settings)
    place = {other.images.key(index): index for index in range(len(other.images))}
    for index in (0, 50, 95):
        first, second = sample_of(one, 3, index), sample_of(other, 3, place[one.images.key(index)])
        assert {"pixels", "tokens", "order", "uniform_draws", "jitter_factors", "jitter_order"} < set(first)
        assert all(np.array_equal(first[name], second[name]) for name in first)
    for name in ("order", "uniform_draws", "jitter_factors"):
        drawn = [sample_of(one, 3, 0), sample_of(one, 4, 0), sample_of(one, 3, 1)]
        drawn.append(sample_of(loader(chain, "data.color_jitter=0.4", seed=1), 3, 0))
        assert len({sample[name].tobytes() for sample in drawn}) == 4


def test_a_sample_does_not_depend_on_the_others_of_its_batch(chain):
    load = loader(chain, "data.color_jitter=0.4")
    batch = load([(1, 7), (2, 50), (1, 31)])
    assert batch["pixels"].is_contiguous(memory_format=torch.channels_last)
    for place, (epoch, index) in enumerate([(1, 7), (2, 50), (1, 31)]):
        alone = sample_of(load, epoch, index)
        assert all(np.array_equal(alone[name], batch[name][place].numpy()) for name in batch)


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


ADJUSTMENTS = {BRIGHTNESS: adjust_brightness, CONTRAST: adjust_contrast, SATURATION: adjust_saturation}


@given(factors=st.lists(st.floats(0.6, 1.4), min_size=3, max_size=3), order=st.permutations(list(ADJUSTMENTS)))
def test_jitter_is_torchvisions_adjustments_in_the_order_drawn(factors: list[float], order: list[int]):
    images = torch.from_numpy(np.stack([smooth_noise(seed) for seed in range(2)])).float()
    expected = images[1:] / 255
    for which in order:
        expected = ADJUSTMENTS[which](expected, factors[which])
    # The other image of the batch has factors and an order of its own.
    drawn = torch.tensor([[1.2, 0.7, 0.9], factors]), torch.tensor([[2, 0, 1], order])
    found = jitter(images, *drawn)[1:]
    assert (found - expected * 255).abs().max() < 0.05


def smooth_noise(seed: int) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC)).transpose(2, 0, 1)


def test_jitter_is_drawn_evenly_from_its_range():
    random = np.random.default_rng(0)
    factors, orders = map(np.stack, zip(*(draw_jitter(0.4, random) for _ in range(2000)), strict=True))
    assert factors.dtype == np.float32
    assert 0.6 <= factors.min() < 0.61
    assert 1.39 < factors.max() <= 1.4
    assert np.abs(factors.mean(0) - 1).max() < 0.02
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 6
    assert counts.min() > 270


def test_images_that_pillow_must_decode_look_the_same_once_that_is_known(chain, tmp_path: Path):
    picture, turned = Image.fromarray(smooth_noise(5).transpose(1, 2, 0)), Image.Exif()
    turned[ExifTags.Base.Orientation] = 3
    folder = tmp_path / "images"
    folder.mkdir()
    picture.save(folder / "plain.jpg")
    picture.save(folder / "turned.jpg", exif=turned)
    picture.save(folder / "other.png")
    store = encode_shards(folder, chain.codebook, tmp_path / "tokens")
    load = LoadBatch(join(folder, store), resolve("vit-tiny-16", GRID))
    once, again = (load([(0, index) for index in range(3)])["pixels"].int() for _ in range(2))
    assert torch.equal(once, again)
    other, plain, turned = once  # by key
    assert (plain - other).abs().float().mean() < 6
    assert (plain - turned.flip(1, 2)).abs().float().mean() < 1
    assert (plain - turned).abs().float().mean() > 20


def test_jitter_changes_nothing_else_of_a_sample(chain):
    plain, jittered = (sample_of(loader(chain, f"data.color_jitter={each}"), 0, 0) for each in (0, 0.4))
    assert set(jittered) - set(plain) == {"jitter_factors", "jitter_order"}
    assert all(np.array_equal(plain[name], jittered[name]) for name in plain)


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
    load = LoadBatch(join(tmp_path / "images", TokenStore(chain.tokens)), resolve("vit-tiny-16", GRID))
    with pytest.raises(DataError, match="CRC32"):
        load([(0, 0)])


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
    assert sample_of(loader(chain, "model.image_size=96", "model.patch_size=12"), 0, 0)["pixels"].shape == (3, 96, 96)


def test_settings_of_data_are_checked():
    with pytest.raises(UsageError, match="color_jitter"):
        DataSettings(color_jitter=2)

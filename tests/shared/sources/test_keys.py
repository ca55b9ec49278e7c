"""The index of keys says where each one is, in 16 bytes per key."""

from mapet.shared.sources.keys import KeyIndex

SHARDS = [["a", "b/ö"], [], [f"key {number}" for number in range(1000)], ["日本", ""]]


def test_the_index_knows_the_shard_and_the_row_of_every_key():
    index = KeyIndex(SHARDS)
    for shard, keys in enumerate(SHARDS):
        for row, key in enumerate(keys):
            assert index.candidates(key) == [(shard, row)]
    assert index.candidates("unknown") == []


def test_the_index_takes_16_bytes_per_key():
    assert KeyIndex(SHARDS).nbytes == 16 * sum(map(len, SHARDS))


def test_an_index_may_have_no_keys_and_gives_every_place_of_a_repeated_one():
    assert KeyIndex([]).candidates("a") == []
    assert KeyIndex([["a"], ["b", "a"]]).candidates("a") == [(0, 0), (1, 1)]

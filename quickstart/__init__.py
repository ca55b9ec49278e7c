"""The whole chain on pictures that the package draws: the only room that knows both stages."""

"""Class labels: what a label is, where a source's labels are read from, and how a shard stores them."""

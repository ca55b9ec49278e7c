"""Stage one: patch features -> codebook -> tokens -> looking at them. Never imports `train_stage`."""

"""Images with masks: where they lie, what a mask holds, crops of both, batches."""

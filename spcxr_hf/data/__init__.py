"""Sets of radiographs: tables of rows, labels, shards, and the batches made of them."""

"""From text to tokens with exact byte counts: corpora, shards, tokenizers, datasets, batches."""

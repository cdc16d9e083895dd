"""From text to exact batches: sources, cleaning, tokenizers, packed records, batches."""

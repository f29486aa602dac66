"""Text -> documents -> tokens -> shards or streams -> batches. Knows no model."""

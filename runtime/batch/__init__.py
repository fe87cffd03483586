"""Many questions at once: rows of a folder, a JSONL or a parquet file in, rows of a parquet file out."""

"""Bytes and tables: images, shards, maps, fragments, the bucket."""

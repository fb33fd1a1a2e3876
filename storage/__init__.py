"""Bytes and tables: images, shards, maps, fragments and object stores."""

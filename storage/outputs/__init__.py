"""Outputs: schema, fragments, encoded maps, and pictures for readers."""

"""Inputs: records in loose images, tar shards and tables, their labels and their ground truth."""

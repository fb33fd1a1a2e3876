"""Inputs: records from loose images, tar shards and tables, with labels and ground truth."""

"""The evaluate step and the comparison: metrics of stored maps."""

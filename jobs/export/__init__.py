"""Exports an output to the formats of other tools, which need not be installed, and queries it with SQL."""

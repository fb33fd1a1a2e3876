"""Parquet from strangers: page headers are checked, then Arrow reads in bounded memory."""

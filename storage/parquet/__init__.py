"""Untrusted Parquet files: checks page headers, then lets Arrow read in bounded memory."""

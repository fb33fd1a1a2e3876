"""Joins engine, storage and cluster into one job: plan, unit, pipeline, command line."""

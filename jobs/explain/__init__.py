"""The explain step: one model in memory, a decoded unit in, rows out."""

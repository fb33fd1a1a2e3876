"""Says what is wrong with files that start clusters, without a network."""

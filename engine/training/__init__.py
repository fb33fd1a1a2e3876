"""Heads that are trained once on a model's feature maps, and then explain every image in one forward pass."""

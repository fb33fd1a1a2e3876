"""The model: one adapter around a borrowed network, its blocks, taps, targets and features."""

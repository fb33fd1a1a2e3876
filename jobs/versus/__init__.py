"""The difference of two outputs, A and B, of one data set: the same records and targets side by side."""

"""The numbers: tensors in, arrays out."""

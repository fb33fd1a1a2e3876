"""Exports: an output in the forms that other tools read, written without them."""

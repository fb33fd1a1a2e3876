"""The audit: what all maps of an output say about the model, and which shortcuts it takes."""

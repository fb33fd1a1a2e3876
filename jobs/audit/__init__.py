"""The audit: what the maps of a whole output say about the model, and which shortcuts it can be shown to take."""

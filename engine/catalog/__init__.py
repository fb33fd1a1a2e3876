"""What the engine offers, as plain values: readable without torch."""

"""Names, parameters, needs and costs of what the engine offers; imports no torch."""

"""The linearised model, and the mathematics on it."""

"""Tests on a real model. `python -m tests.real.model` gets it, `pytest -m real` runs them."""

"""The questions: what a scope is, and one published method per file."""

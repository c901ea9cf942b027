"""Many prompts: in batches, in their order, and kept on disk so that nothing is lost."""

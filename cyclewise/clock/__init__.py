"""The clock: where each cycle of inference went, how far that is from what the machine can do."""

"""Load the parts of a model, and decide how long each stays in memory."""

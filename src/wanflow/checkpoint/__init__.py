"""Read weights of any container and dialect: find, check, and load the parts of a model."""

"""The models as plain modules, one file each."""

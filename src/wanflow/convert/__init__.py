"""Convert weights from any layout and storage format to any other."""

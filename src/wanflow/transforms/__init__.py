"""What attaches to a finished model: kernels, packed weights, LoRAs, streaming, tiles."""

"""LoRA and other adapter files: find, read, apply."""

"""Fine-tuning, and nano's world, training and evaluation."""

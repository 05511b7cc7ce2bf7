"""What a model is trained for: masking, losses, augmentations."""

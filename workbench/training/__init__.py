"""From a recipe to checkpoints."""

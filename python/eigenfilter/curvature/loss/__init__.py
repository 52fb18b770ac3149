"""The loss as a function of its parameters: its batches, its points, its vectors."""

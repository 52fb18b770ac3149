"""The loss as one fixed function of the parameters: its batches, derivatives and vectors."""

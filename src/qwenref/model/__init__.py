"""The room that makes the numbers: configuration, checkpoint, weights, attention."""

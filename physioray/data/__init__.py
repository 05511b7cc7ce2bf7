"""From recordings to batches of 30-second windows."""

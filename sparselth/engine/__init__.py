"""What takes training steps for a batch of jobs; `choose` is the one door."""

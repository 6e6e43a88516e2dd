"""What can be done with a run: act, sample, reconstruct, and be evaluated."""

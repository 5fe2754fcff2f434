"""What a run has learnt, in the formats of other programs."""

"""PAA: Probabilistic Anchor Assignment with IoU prediction (Kim and Lee, ECCV 2020)."""

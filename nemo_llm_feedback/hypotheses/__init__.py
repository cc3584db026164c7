"""N-best lists: how hypotheses are proposed, scored, rewarded and kept."""

"""What becomes of the counts: recorded by group, by question, or as attributions."""

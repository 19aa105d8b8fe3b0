"""What was counted: integer counts by group or by question, attributions, and several conditions of them."""

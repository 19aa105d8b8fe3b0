"""Whether other questions, or none, would have given the same neurons; resampling, tests and corrections."""

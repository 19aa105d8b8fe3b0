"""Which neurons exist, and sets of them."""

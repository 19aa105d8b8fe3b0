"""Asking a model: batches, readers of answers, ablations, and the engines that run one batch."""

"""Activation sparsity and flat minima (arXiv 2605.25612). Nothing is here yet: this half comes after `merging`."""

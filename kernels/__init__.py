"""The QK-norm kernels, each beside its plain torch twin.

Knows tensors and nothing of models, requests or the wire. This file imports no torch, so that the
front end can read `fusewire.kernels.modes` without it.
"""

"""The model: configuration, weights, layers, attention, paged KV cache, sampler and runner.

Knows tensors and token ids; nothing of requests, scheduling policy or the wire. This file imports
no torch, so that the front end can read `fusewire.model.sampling_params` and find the demo model
without it.
"""

"""Weights outside of training: PyTorch's layouts and files, checkpoints, cards, transfer.

Only `files` imports torch, and only for `.pt` and `.ckpt`. May import `results` and the rooms below
it. Begin with `network`, then read `files.load`.
"""

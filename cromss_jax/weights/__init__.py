"""Weights outside of training: PyTorch's layouts and files, checkpoints, cards, transfer.

torch is imported in `files` alone, and only for `.pt` and `.ckpt`. May import `results` and what
lies below it. Begin with `network`, then `files.load`.
"""

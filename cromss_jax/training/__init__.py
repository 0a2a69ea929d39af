"""Pretraining and fine-tuning: the compiled steps, the loop around them, checkpoints, devices.

May import every room except `costs`; only the commands import this one. Begin with `pretrain`, then
read `loop` and `pretrain_step`.
"""

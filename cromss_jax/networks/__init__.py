"""U-Nets and other decoders on ResNet encoders, parameter for parameter those of smp.

Flax NNX modules that take images [B, H, W, K] and return logits. May import `method`, `sensors`
and `files`. Begin with `fusion`, which builds what a configuration names.
"""

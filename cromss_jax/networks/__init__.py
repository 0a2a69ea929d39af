"""U-Nets and other decoders on ResNet encoders, with the same parameters as in smp.

smp is segmentation_models_pytorch. The networks are Flax NNX modules that take images [B, H, W, K]
and return logits. May import `method`, `sensors` and `files`. Begin with `fusion`, which builds the
network that a configuration describes.
"""

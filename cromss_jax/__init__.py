"""Cross-modal pretraining of segmentation networks on noisy labels."""

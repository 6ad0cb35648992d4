"""Training: one readable loop, its configuration, its checkpoints and its run folder.

Nothing is imported here, so that the configuration can be read without loading PyTorch.
"""

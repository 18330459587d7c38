"""SSD's stages as Triton kernels."""

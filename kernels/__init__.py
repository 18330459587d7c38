"""The mathematics of one device. Knows no process group and no config.

A folder a kernel, and in each: `naive.py`, the formula as code, in any dtype, which every faster form
is tested against; and the forms themselves, registered as operators of the `plait` namespace so that
one call finds the form for its device.

    ssd/            the scan of Mamba-2, in stages that states can leave between
    convolution/    the causal depthwise convolution before it
    normalization/  RMSNorm and the gated group norm after it
    attention/      causal attention over packed documents
    activation/     squared ReLU, SwiGLU
    experts/        tokens sorted by expert, a product an expert, and back
    cross_entropy/  the head and the loss in one, never holding tokens x vocabulary
"""

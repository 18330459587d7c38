"""Squared ReLU and SwiGLU in one Triton kernel each, forward and backward: one pass, rounded once."""

from .launch import squared_relu, squared_relu_backward, swiglu, swiglu_backward

__all__ = ["squared_relu", "squared_relu_backward", "swiglu", "swiglu_backward"]

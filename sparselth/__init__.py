"""Lottery tickets on sparse kernels: does it still learn, is it really faster, can I use it?"""

__version__ = "0.1.0"

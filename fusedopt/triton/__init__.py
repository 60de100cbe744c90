"""The Triton engine: rules, formats and passes as kernels, over the tables that the C++ engines walk.

Importing it imports triton, which must be there; ``fusedopt.backends.triton`` asks first.
"""

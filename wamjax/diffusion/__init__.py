"""Implements the equations of diffusion and flow matching, without networks.

A process (`flow`, `edm`, `ddpm`) is a Gaussian path ``x = alpha(level) x0 + sigma(level) eps`` with
a quantity that a network regresses on it. A noise law (`noise`) draws training levels. A solver
(`solvers`, `multistep`, `stochastic`) runs a model from noise to data along a grid of levels; any
solver works with any process.
"""

"""Equations of diffusion and flow matching: processes, noise laws and solvers. No networks."""

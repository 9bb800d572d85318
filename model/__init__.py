"""Networks, samplers, and the code that runs them. Importing this package does not import torch."""

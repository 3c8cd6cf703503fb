"""What one rank of a recipe keeps in the memory of its device, before anything runs.

Weights, gradients and optimizer states follow DeepSpeed's own arithmetic (`zero`); activations are counted by running
the model on torch's meta device, which has shapes but no data (`trace`). `plan` puts both together, `search` looks for
values that fit.
"""

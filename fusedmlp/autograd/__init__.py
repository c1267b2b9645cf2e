"""The torch.autograd.Functions of the ops: what forward saves and what backward returns."""

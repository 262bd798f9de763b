"""tmp"""
import torch
from golfbook.errors import RunError
def reverse_factor(gram, damping, name=""):
    H=gram.double(); H=H+damping*H.diagonal().mean()*torch.eye(len(H),dtype=H.dtype)
    return torch.linalg.cholesky(H.flip(0).flip(1)).flip(0).flip(1).T.float().contiguous()

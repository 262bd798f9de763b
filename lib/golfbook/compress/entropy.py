"""tmp"""
import torch
from golfbook.compress.trellis import points
def estimate_bits(tensors):
    keys=[]
    for t in tensors:
        q=t.q.double(); p=points(t.q,t.states)
        v=q.square()+.02
        a=v.mean(1).log2(); b=(v/v.mean(1,keepdim=True)).mean(0).log2()
        c=((a[:,None]+b)).round().clamp(-8,24).long()+8
        keys.append(((c*2+(p&1))*65536+(t.q.long()+32768)).flatten())
    k=torch.cat(keys)
    u,n=k.unique(return_counts=True)
    cls,inv=(u//65536).unique(return_inverse=True)
    tot=torch.zeros(len(cls),dtype=torch.float64).index_add_(0,inv,n.double())
    return float(-(n.double()*(n/tot[inv]).log2()).sum())

def classes(q):
    v=q.double().square()+.02
    a=v.mean(1).log2(); b=(v/v.mean(1,keepdim=True)).mean(0).log2()
    return (a[:,None]+b).round().clamp(-8,24).long()+8
def prices(q, states, most=255):
    from golfbook.compress.trellis import Prices
    c=classes(q); z=points(q,states)&1; W=2*most+1
    k=((c*2+z)*W+q.long().clamp(-most,most)+most).flatten()
    n=torch.bincount(k,minlength=33*2*W).double().view(33,2,W)
    # smooth: add a little of a neighbour average
    n=n+.02
    t=(n.sum(2,keepdim=True)/n).log2().float()
    return Prices(c,t)

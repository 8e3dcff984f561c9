"""One key or value for several heads: what loses least of what the heads compute.

Everything here is about two products of a layer, its *circuits* (Elhage et al. 2021). With z~ = [z; 1], and biases as
the last column of their weights, head h computes

    the score of a query at i for a key at j    z~_i^T M_h z~_j,     M_h = q_h^T k_h        (QK)
    what a token adds to the residual stream    N_h z~_j,            N_h = o_h v_h          (OV)

Both have the form ``write_h^T read_h``: what is read from a token, and how a head uses it. Heads that share a key or
value read the same; how each uses it may differ. So for a group of heads the question is: which ``shared`` (D, C + 1)
in place of the reads, and which ``mix_h`` (D, D) on the other side, make ``write_h^T mix_h^T shared`` closest to
``write_h^T read_h`` for all h of the group? All functions return ``shared`` and ``mix``; in the end ``q_h`` becomes
``mix_h q_h``, and ``o_h`` becomes ``o_h mix_h^T``.

Shapes: H heads of width D in G groups of H / G neighbours; N = C + 1. All tensors are float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptlab.conversion.layers import Heads
from gptlab.conversion.statistics import Moments

NOTHING = 1e-14
"""Shares of a group's largest eigenvalue below this are rounding errors."""


def root(matrices: Tensor) -> Tensor:
    """Return the symmetric square roots of (..., D, D) positive semidefinite matrices."""
    values, vectors = torch.linalg.eigh(matrices)
    return vectors * values.clamp(min=0).sqrt()[..., None, :] @ vectors.mT


def energies(read: Tensor, use: Tensor, moment: Tensor) -> Tensor:
    """Return the Gram matrix of all reads, weighed by use: (H, D, H, D).

    The trace of a group's part is the energy of its circuits, E |write_h^T read_h z|^2 summed over its heads; the D
    largest eigenvalues of that part are how much of it one shared read can keep.

    Args:
        read: (H, D, N).
        use: (H, D, D) E[write_h write_h^T].
        moment: (N, N) E[z z^T].
    """
    rows = (root(use) @ read).flatten(0, 1)  # (H D, N)
    return (rows @ moment @ rows.T).unflatten(1, use.shape[:2]).unflatten(0, use.shape[:2])


def factorise(read: Tensor, use: Tensor, moment: Tensor, n_groups: int) -> tuple[Tensor, Tensor]:
    """Share reads by a joint truncated singular value decomposition: the best of all, where the gauge is free.

    The score of a key, or the output, is off by ``write_h^T (read_h - mix_h^T shared) z``. Its mean square, with the
    two sides independent, summed over the group, is

        sum_h | W_h (read_h - mix_h^T shared) S |^2,    W_h^T W_h = E[write_h write_h^T],    S S^T = E[z z^T].

    With X the stack of all W_h read_h S, (H / G * D, N), and X = U Sigma V^T, it is least (Eckart and Young 1936) when
    the rows of ``shared S`` span the first D rows of V^T; what is lost is the sum of the other sigma^2. Written without
    an inverse of S, so that directions of z without variance do no harm:

        shared = Sigma^-1 U^T [W_h read_h],    mix_h = shared S S^T read_h^T,

    the second being the linear regression of head h's own read on the shared one. U and Sigma come from the
    eigenvectors of X X^T (`energies`).

    Every invertible T leaves ``(T shared, T^-T mix)`` the same function. It is chosen diagonal: each of the D
    directions is split evenly, sigma^(1/2) for each side, and one number keeps the ratio of the two sides' root mean
    squares as it was. (Learning rates and weight decay see a model's weights, not its function.)

    Args:
        read: (H, D, N).
        use: (H, D, D) E[write_h write_h^T].
        moment: (N, N) E[z z^T].
        n_groups: G.

    Returns:
        shared (G, D, N) and mix (H, D, D).
    """
    width = read.shape[1]
    shared, mix = [], []
    for reads, uses in zip(read.chunk(n_groups), use.chunk(n_groups), strict=True):
        weighed = (root(uses) @ reads).flatten(0, 1)  # (g D, N)
        squares, directions = torch.linalg.eigh(weighed @ moment @ weighed.T)
        squares, directions = squares[-width:], directions[:, -width:]  # sigma^2 and U, (D,) and (g D, D)
        if squares[-1] <= 0:  # heads that read nothing, or whose reads are not used
            shared.append(reads[0] * 0)
            mix.append(uses * 0)
            continue
        kept = squares > NOTHING * squares[-1]
        sigma = squares.where(kept, 1.0).sqrt()
        ratio = (reads @ moment * reads).sum() / uses.diagonal(dim1=1, dim2=2).sum()
        scale = sigma.sqrt() * (ratio / len(reads)) ** 0.25
        one = kept[:, None] * (directions.T @ weighed) / sigma[:, None]  # rows are orthonormal under the moment
        mix.append(one @ moment @ reads.mT / scale[:, None])  # (g, D, D)
        shared.append(one * scale[:, None])
    return torch.stack(shared), torch.cat(mix)


def align(read: Tensor, moment: Tensor, n_groups: int, rounds: int = 10) -> tuple[Tensor, Tensor]:
    """Share reads by orthogonal Procrustes: rotate each head's read to the group's mean, and take the mean.

    The rotation R minimises |R read_h S - mean S|^2 (Schönemann 1966); mean and rotations are found in turns, from the
    first head on (generalised Procrustes analysis, Gower 1975). A rotation of both sides changes nothing, so only the
    mean loses. Arguments and results as in `factorise`.
    """
    shared, mix = [], []
    for reads in read.chunk(n_groups):
        rows = reads.flatten(0, 1)
        gram = (rows @ moment @ rows.T).unflatten(1, reads.shape[:2]).unflatten(0, reads.shape[:2])  # (g, D, g, D)
        rotated, to_mean = reads, gram[0].transpose(0, 1)  # (g, D, D): of mean S S^T read_h^T, up to a factor
        for _ in range(rounds):
            u, _, vh = torch.linalg.svd(to_mean)
            rotated = u @ vh
            to_mean = torch.einsum("jab,jbhc->hac", rotated, gram)
        shared.append((rotated @ reads).mean(0))
        mix.append(rotated)
    return torch.stack(shared), torch.cat(mix)


def pair_energies(read: Tensor, use: Tensor, moment: Tensor) -> Tensor:
    """Return for each pair of rotated channels the Gram matrix of the heads' reads: (D / 2, H, H) complex.

    As `energies`, for keys that positions rotate: the largest eigenvalue of a group's part is what one pair keeps.
    """
    rows = _pairs(read, use)
    return _weigh(rows, moment) @ rows.mH


def factorise_pairs(read: Tensor, use: Tensor, moment: Tensor, n_groups: int) -> tuple[Tensor, Tensor]:
    """Share keys that rotary positions rotate: one rotation and one scale for each pair of channels is all the freedom.

    Channels (d, d + D / 2) rotate together. As complex numbers, q and k of a pair are multiplied by e^(i p theta); the
    score is the real part of conj(q) k; what commutes with the rotation is a complex factor c, k = c shared,
    q' = conj(c) q. For each pair the best shared key is the first right singular vector of the (H / G, N) complex
    matrix of the group's reads, each weighed by the root mean square of its queries, and whitened. Its scale keeps the
    ratio of keys to queries.

    Arguments and results as in `factorise`.
    """
    half = read.shape[1] // 2
    shared, mix = [], []
    for reads, uses in zip(read.chunk(n_groups), use.chunk(n_groups), strict=True):
        weighed = _pairs(reads, uses)  # (D / 2, g, N)
        gram = _weigh(weighed, moment) @ weighed.mH  # (D / 2, g, g)
        directions = torch.linalg.eigh(gram).eigenvectors[..., -1:]  # (D / 2, g, 1)
        one = directions.mH @ weighed  # (D / 2, 1, N)
        spread = _weigh(one, moment).mH  # (D / 2, N, 1)
        own = torch.complex(reads[:, :half], reads[:, half:])  # (g, D / 2, N)
        square = (one @ spread).real[..., 0].clamp(min=torch.finfo(torch.float64).tiny)  # (D / 2, 1)
        factor = (own.transpose(0, 1) @ spread)[..., 0] / square  # (D / 2, g)
        # The scale: as much as the keys had on average.
        scale = factor.abs().square().mean(1, keepdim=True).sqrt()
        scale = scale.where(scale > 0, 1.0)
        one, factor = one[:, 0] * scale, factor / scale
        shared.append(torch.cat([one.real, one.imag]))
        mix.append(_rotations(factor.mT.conj()))
    return torch.stack(shared), torch.cat(mix)


def _pairs(read: Tensor, use: Tensor) -> Tensor:
    """(H, D, N) -> (D / 2, H, N) complex: pairs of channels, each weighed by the root mean square of its use."""
    half = read.shape[1] // 2
    power = use.diagonal(dim1=1, dim2=2).unflatten(1, (2, half)).sum(1)  # (H, D / 2)
    return (torch.complex(read[:, :half], read[:, half:]) * power.sqrt()[..., None]).transpose(0, 1)


def _weigh(rows: Tensor, moment: Tensor) -> Tensor:
    """Multiply complex rows (D / 2, H, N) by a real matrix (N, N): two real products, each of all rows at once."""
    real, imaginary = (part.flatten(0, 1) @ moment for part in (rows.real, rows.imag))
    return torch.complex(real, imaginary).unflatten(0, rows.shape[:2])


def _rotations(factors: Tensor) -> Tensor:
    """(H, D / 2) complex factors -> (H, D, D) matrices that multiply each pair of channels by its factor."""
    real, imaginary = factors.real.diag_embed(), factors.imag.diag_embed()
    return torch.cat([torch.cat([real, -imaginary], -1), torch.cat([imaginary, real], -1)], -2)


def circuit_errors(source: Heads, converted: Heads, moments: Moments) -> tuple[float, float]:
    """Return how far the QK and the OV circuits of a layer moved: squared error over squared size, summed over heads.

    Arguments as in `head_energies`.
    """
    lost, whole = head_energies(source, converted, moments)
    keys, values = (lost.sum(1) / whole.sum(1)).tolist()
    return keys, values


def head_energies(source: Heads, converted: Heads, moments: Moments) -> tuple[Tensor, Tensor]:
    """Return the squared error of each head's circuits, and their squared size: each (2, H), QK and then OV.

    Weighed by what the layer reads, and without what cancels: for QK the part of M_h that is the same for all keys, for
    OV that which is the same for all tokens (`Moments.centred`). With rotary positions, QK is that of tokens at the
    same place.

    Args:
        source: heads before, in the same order as after.
        converted: heads after; fewer keys and values.
        moments: of the layer's inputs.
    """
    before, after = source.expanded(), converted.expanded()
    width = before.q.shape[1]
    signs = torch.ones(2 * width, dtype=torch.float64)
    signs[width:] = -1.0

    def both(write: Tensor, new_write: Tensor, read: Tensor, new_read: Tensor, weigh: Tensor | None) -> Tensor:
        # |write^T read|^2 in its own width: the Gram matrices of both sides multiplied, element by element.
        writes, reads = torch.cat([write, new_write], 1), torch.cat([read, new_read], 1)  # (H, 2 D, ...)
        grams = ((writes if weigh is None else writes @ weigh) @ writes.mT) * (reads @ moments.centred @ reads.mT)
        lost = (grams * signs[:, None] * signs).sum((1, 2))  # what the difference of the two circuits holds
        return torch.stack([lost, grams[:, :width, :width].sum((1, 2))])  # (2, H)

    keys = both(before.q, after.q, before.k, after.k, moments.uncentred)
    values = both(before.o.mT, after.o.mT, before.v, after.v, None)
    lost, whole = torch.stack([keys, values], 1)
    return lost, whole

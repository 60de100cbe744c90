"""SGDW."""

from __future__ import annotations

from .sgd import SGD

__all__ = ["SGDW"]


class SGDW(SGD):
    r"""SGD with decoupled weight decay (`Loshchilov & Hutter, 2019 <https://arxiv.org/abs/1711.05101>`_).

    .. math::
        \theta_t &\leftarrow \theta_{t-1} - \gamma \lambda \theta_{t-1} \\
        b_t &= \mu b_{t-1} + (1 - \tau) g_t, \qquad b_1 = g_1 \\
        \theta_t &\leftarrow \theta_t - \gamma \, b_t \qquad
            \text{or, Nesterov:} \quad \theta_t \leftarrow \theta_t - \gamma (g_t + \mu b_t)

    State, arguments and errors: as :class:`SGD`. The paper's algorithm 1 has the learning rate inside of the momentum;
    here it is outside, as everywhere in torch. torch.optim has no SGDW: checkpoints of its SGD fit.
    """

    rule = "sgdw"

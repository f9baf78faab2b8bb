"""The negative log-likelihood of the target."""

from objectives.losses.base import Loss


def cross_entropy() -> Loss:
    """l = -log softmax(z)_y."""
    return Loss()

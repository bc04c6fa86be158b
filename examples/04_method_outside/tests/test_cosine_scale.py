"""What holds for every method holds for this one."""

from addenda.conformance.test_methods import *  # noqa: F403

METHODS = ["cosine-scale"]

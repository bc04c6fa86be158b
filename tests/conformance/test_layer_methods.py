"""The registered methods on layers; what holds for them is said in the package, for those from outside too."""

from addenda.conformance.test_methods import *  # noqa: F403

"""The registered methods that change the sequence; what holds for them is said in the package."""

from addenda.conformance.test_sequence import *  # noqa: F403

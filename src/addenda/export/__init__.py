"""Adapters in the forms other tools load, each proven to answer as the trained model does."""

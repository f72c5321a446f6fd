"""Planners: pure functions of a spec, a model and a measured hardware profile, and the clock that checks them."""

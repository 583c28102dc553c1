"""Attacks on the fork sandbox. Each is a record; see :mod:`tests.attack.record`."""

"""Carries out what the state machines command: the process that moves one VM, at either end."""

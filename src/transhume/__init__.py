"""Transhume: live migration and farm management for Linux servers running QEMU virtual machines."""

__version__ = "0.1.0"

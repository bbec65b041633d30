"""Examining a host before it carries VMs: each check is a judgement of facts, beside what gathers them."""
